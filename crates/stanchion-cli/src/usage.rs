//! Answers to what could not be parsed: help, the version, or one line on what was wrong.

use clap::error::ErrorKind;

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
                "a command is missing: run, once, ls, inspect, watch, break, completions or man; `stanchion --help` explains them",
            );
            exit_code::USAGE
        }
        kind => {
            let text = error.render().to_string();
            Verbosity::Normal.problem(message(kind, &text));
            exit_code::USAGE
        }
    }
}

/// What clap says in several paragraphs, in one line and with the way out.
fn message(kind: ErrorKind, text: &str) -> String {
    let mut parts = text.split("\n\n").map(|part| part.split_whitespace().collect::<Vec<_>>().join(" "));
    let what = parts.next().unwrap_or_default();
    let what = what.strip_prefix("error: ").unwrap_or(&what).to_owned();
    let usage = text.split_once("Usage: ").map(|(_, usage)| usage.split_whitespace().collect::<Vec<_>>().join(" "));
    let usage = usage.as_deref().and_then(|usage| usage.split(" For more information").next()).unwrap_or_default();
    let command = usage.split(' ').take(2).filter(|word| !word.starts_with(['<', '['])).collect::<Vec<_>>().join(" ");
    let command = if command.is_empty() { "stanchion".to_owned() } else { command };
    let runs = command.ends_with(" run") || command.ends_with(" once");
    let hint = match kind {
        ErrorKind::UnknownArgument | ErrorKind::MissingRequiredArgument if runs => {
            "; the command to run comes after `--`"
        }
        _ => "",
    };
    let tip = parts.find_map(|part| part.strip_prefix("tip: ").map(|tip| format!("; {tip}"))).unwrap_or_default();
    format!("{what}{}{hint}; `{command} --help` explains it", if hint.is_empty() { tip } else { String::new() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arguments::Arguments;
    use clap::Parser as _;

    fn said(arguments: &[&str]) -> String {
        let error =
            Arguments::try_parse_from(std::iter::once("stanchion").chain(arguments.iter().copied())).unwrap_err();
        message(error.kind(), &error.render().to_string())
    }

    #[test]
    fn a_usage_error_is_one_line_that_says_what_would_be_right() {
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
