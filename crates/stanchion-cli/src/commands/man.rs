//! `man`: the man pages, from the definition of the arguments and the texts of the help.

use std::io;
use std::path::Path;

use clap::CommandFactory as _;
use clap_mangen::Man;
use clap_mangen::roff::{Roff, bold, roman};

use crate::arguments::Arguments;
use crate::message::{Failure, quoted};
use crate::output::print;
use crate::{exit_code, help};

pub(super) fn execute(folder: Option<&Path>) -> Result<u8, Failure> {
    let mut tool = Arguments::command().disable_help_subcommand(true);
    // Names the subcommands.
    tool.build();
    match folder {
        None => {
            let page = page(&tool);
            let page =
                page.map_err(|error| Failure::new(exit_code::INTERNAL, format!("cannot make the man page: {error}")))?;
            print(&String::from_utf8_lossy(&page))?;
        }
        Some(folder) => write_all(&tool, folder).map_err(|error| {
            let code = match error.kind() {
                io::ErrorKind::PermissionDenied => exit_code::NOT_PERMITTED,
                _ => exit_code::INTERNAL,
            };
            let folder = quoted(&folder.to_string_lossy());
            Failure::new(code, format!("cannot write man pages into `{folder}`: {error}"))
        })?,
    }
    Ok(exit_code::OK)
}

fn write_all(tool: &clap::Command, folder: &Path) -> io::Result<()> {
    std::fs::create_dir_all(folder)?;
    let shown = tool.get_subcommands().filter(|command| !command.is_hide_set());
    for command in std::iter::once(tool).chain(shown) {
        std::fs::write(folder.join(format!("{}.1", name_of(command))), page(command)?)?;
    }
    Ok(())
}

/// Returns the name of a page, such as `stanchion-run`.
fn name_of(command: &clap::Command) -> &str {
    command.get_display_name().unwrap_or_else(|| command.get_name())
}

fn page(command: &clap::Command) -> io::Result<Vec<u8>> {
    let man = Man::new(command.clone());
    // The library leaves out an empty date, and what comes after it takes its place.
    let version = env!("CARGO_PKG_VERSION");
    let mut page = format!(".TH \"{}\" 1 \"\" \"stanchion {version}\"\n", name_of(command)).into_bytes();
    man.render_name_section(&mut page)?;
    man.render_synopsis_section(&mut page)?;
    man.render_description_section(&mut page)?;
    man.render_options_section(&mut page)?;
    if command.has_subcommands() {
        man.render_subcommands_section(&mut page)?;
    }
    more_sections(command).to_writer(&mut page)?;
    Ok(page)
}

/// Returns the sections that the arguments do not define.
fn more_sections(command: &clap::Command) -> Roff {
    let name = command.get_name();
    let mut page = Roff::new();
    if let Some(json) = help::json(name) {
        page.control("SH", ["JSON"]);
        as_it_is(&mut page, json.lines());
    }
    if command.get_arguments().any(takes_duration) || command.has_subcommands() {
        page.control("SH", ["DURATIONS"]).text([roman(help::DURATIONS)]);
    }
    page.control("SH", ["EXIT STATUS"]);
    entries(&mut page, &exit_code::table(name));
    page.control("SH", ["ENVIRONMENT"]);
    entries(&mut page, &help::ENVIRONMENT);
    page.control("SH", ["EXAMPLES"]);
    let examples = help::examples(name).iter().enumerate().flat_map(|(number, (line, effect))| {
        let gap = (number > 0).then(String::new);
        let effect = (!effect.is_empty()).then(|| format!("    {effect}"));
        gap.into_iter().chain([(*line).to_owned()]).chain(effect)
    });
    as_it_is(&mut page, examples);
    if !command.has_subcommands() {
        page.control("SH", ["SEE ALSO"]).text([bold("stanchion"), roman("(1)")]);
    }
    page
}

fn takes_duration(argument: &clap::Arg) -> bool {
    argument.get_value_names().is_some_and(|names| names.iter().any(|name| name == "DUR"))
}

/// Adds lines that a reader's program must not fill.
fn as_it_is(page: &mut Roff, lines: impl Iterator<Item = impl Into<String>>) {
    page.control("nf", []);
    for line in lines {
        page.text([roman(line)]);
    }
    page.control("fi", []);
}

/// Adds terms with their explanations. A term that is repeated is shown once.
fn entries(page: &mut Roff, entries: &[help::Entry]) {
    let mut before = "";
    for (term, text) in entries {
        if *term == before {
            page.control("br", []);
        } else {
            page.control("TP", ["9"]).text([bold(*term)]);
        }
        page.text([roman(*text)]);
        before = term;
    }
}
