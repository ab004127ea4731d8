//! Answers arguments that could not be parsed: with help, the version, or one line about the error.

use std::ffi::OsString;

use clap::CommandFactory as _;
use clap::error::ErrorKind;
use stanchion::store::redacted;

use crate::arguments::Arguments;
use crate::exit_code;
use crate::message::Verbosity;
use crate::output::print;

/// Prints help or the version on stdout, or the error on stderr; gives the exit code.
pub(crate) fn answer(error: &clap::Error) -> u8 {
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => match print(&error.render().to_string()) {
            Ok(_) => exit_code::OK,
            Err(failure) => failure.code,
        },
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand | ErrorKind::MissingSubcommand => {
            let commands = commands();
            let message =
                format!("a command is missing; the commands are {commands}; `stanchion --help` explains them");
            Verbosity::Normal.problem(message);
            exit_code::USAGE
        }
        _ => {
            Verbosity::Normal.problem(explain(std::env::args_os().skip(1)));
            exit_code::USAGE
        }
    }
}

/// Returns the usage error of these arguments. They are parsed as they may be shown, because clap quotes them, and one may be a URL
/// with a password.
fn explain(arguments: impl Iterator<Item = OsString>) -> String {
    let shown: Vec<OsString> = arguments
        .map(|argument| match argument.into_string() {
            Ok(text) => redacted(&text).into_owned().into(),
            Err(bytes) => bytes,
        })
        .collect();
    let command = command_of(shown.iter().cloned());
    let has_dashes = shown.iter().any(|argument| argument == "--");
    match Arguments::of(shown) {
        Err(error) => message(error.kind(), &error.render().to_string(), &command, has_dashes),
        Ok(_) => format!("an argument is wrong, and holds what may be a password; `{command} --help` explains it"),
    }
}

/// Returns clap's error, which has several paragraphs, as one line that ends with the way out.
fn message(kind: ErrorKind, text: &str, command: &str, has_dashes: bool) -> String {
    let one_line = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
    let what = one_line(text.split("\n\n").next().unwrap_or_default());
    let what = what.strip_prefix("error: ").unwrap_or(&what);
    let line_after = |mark| text.lines().find_map(|line| line.trim_start().strip_prefix(mark)).map(str::trim);
    let tip = line_after("tip:").map(str::to_owned);
    let usage = line_after("Usage:").map(|usage| format!("write {usage}"));
    let runs = matches!(command, "stanchion run" | "stanchion once" | "stanchion elect");
    let way_out = match kind {
        ErrorKind::MissingRequiredArgument if what.contains("--every") => {
            Some("give the period (--every DUR) or a number that rises with the schedule (--slot N)".to_owned())
        }
        ErrorKind::MissingRequiredArgument if runs => {
            Some("the key comes first, and then the command to run".to_owned())
        }
        ErrorKind::UnknownArgument if runs => {
            // clap's other tip is to pass the option on as a value.
            let similar = tip.filter(|tip| tip.contains("similar"));
            Some(similar.unwrap_or_else(|| "options of the command to run come after its name".to_owned()))
        }
        ErrorKind::MissingRequiredArgument | ErrorKind::UnknownArgument => tip.or(usage),
        ErrorKind::InvalidSubcommand if tip.is_some() => tip,
        ErrorKind::InvalidSubcommand if has_dashes => {
            Some("to run a command, write `stanchion run KEY -- CMD`".to_owned())
        }
        ErrorKind::InvalidSubcommand => Some(format!("the commands are {}", commands())),
        ErrorKind::InvalidUtf8 => {
            Some("keys and options are UTF-8, only the command to run may be other bytes".to_owned())
        }
        _ => tip,
    };
    let way_out = way_out.map(|way_out| format!("; {way_out}")).unwrap_or_default();
    format!("{what}{way_out}; `{command} --help` explains it")
}

/// Returns the names of all commands, for a sentence.
fn commands() -> String {
    let definition = Arguments::command();
    let names: Vec<_> = definition
        .get_subcommands()
        .filter(|command| !command.is_hide_set())
        .map(|command| command.get_name())
        .collect();
    match names.split_last() {
        Some((last, others)) => format!("{} and {last}", others.join(", ")),
        None => String::new(),
    }
}

/// The command whose help explains more: the first argument that is one.
fn command_of(arguments: impl Iterator<Item = OsString>) -> String {
    let definition = Arguments::command();
    let mut named =
        arguments.take_while(|argument| argument != "--").filter_map(|argument| argument.into_string().ok());
    match named.find(|argument| definition.find_subcommand(argument).is_some()) {
        Some(name) => format!("stanchion {name}"),
        None => "stanchion".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(arguments: &[&str]) -> String {
        explain(arguments.iter().map(OsString::from))
    }

    #[test]
    fn usage_errors_are_one_line_with_a_hint() {
        let table: [(&[&str], &str); 6] = [
            (
                &["run", "k", "-z", "ls"],
                "unexpected argument '-z' found; options of the command to run come after its name; `stanchion run --help` explains it",
            ),
            (&["run", "--key", "k", "ls"], "with --key the command to run comes after `--`; `stanchion run --help`"),
            (&["run", "k", "-w", "soon", "--", "ls"], "is not a duration: write seconds"),
            (&["frob"], "unrecognized subcommand 'frob'; the commands are run, once, "),
            (&["run", "k"], "the key comes first, and then the command to run; `stanchion run --help` explains it"),
            (&["once", "k", "--", "ls"], "--every <DUR>"),
        ];
        for (arguments, expected) in table {
            let text = said(arguments);
            assert!(text.contains(expected) && !text.contains('\n'), "{arguments:?}: {text}");
        }
    }
}
