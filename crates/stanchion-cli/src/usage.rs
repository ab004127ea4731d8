//! Answers arguments that could not be parsed: with help, the version, or one line about the error.

use std::ffi::OsString;

use clap::error::ErrorKind;
use clap::{CommandFactory as _, Parser as _};
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
            Verbosity::Normal.problem(
                "a command is missing: run, once, acquire, extend, release, ls, inspect, watch, force-release, completions or man; `stanchion --help` explains them",
            );
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
    match Arguments::try_parse_from(std::iter::once("stanchion".into()).chain(shown)) {
        Err(error) => message(error.kind(), &error.render().to_string(), &command),
        Ok(_) => format!("an argument is wrong, and holds what may be a password; `{command} --help` explains it"),
    }
}

/// Returns clap's error, which has several paragraphs, as one line that ends with the way out.
fn message(kind: ErrorKind, text: &str, command: &str) -> String {
    let mut parts = text.split("\n\n").map(|part| part.split_whitespace().collect::<Vec<_>>().join(" "));
    let what = parts.next().unwrap_or_default();
    let what = what.strip_prefix("error: ").unwrap_or(&what);
    let runs = matches!(command, "stanchion run" | "stanchion once");
    let way_out = match kind {
        ErrorKind::UnknownArgument | ErrorKind::MissingRequiredArgument if runs => {
            "; the command to run comes after `--`".to_owned()
        }
        ErrorKind::InvalidUtf8 => "; keys and options are UTF-8, only the command to run may be other bytes".to_owned(),
        _ => parts.find_map(|part| part.strip_prefix("tip: ").map(|tip| format!("; {tip}"))).unwrap_or_default(),
    };
    format!("{what}{way_out}; `{command} --help` explains it")
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
        let table: [(&[&str], &str); 5] = [
            (
                &["run", "k", "ls"],
                "unexpected argument 'ls' found; the command to run comes after `--`; `stanchion run --help` explains it",
            ),
            (&["run", "k", "-w", "soon", "--", "ls"], "is not a duration: write seconds"),
            (&["frob"], "unrecognized subcommand 'frob'; `stanchion --help` explains it"),
            (&["run", "k"], "the command to run comes after `--`; `stanchion run --help` explains it"),
            (&["once", "k", "--", "ls"], "--every <DUR>"),
        ];
        for (arguments, expected) in table {
            let text = said(arguments);
            assert!(text.contains(expected) && !text.contains('\n'), "{arguments:?}: {text}");
        }
    }
}
