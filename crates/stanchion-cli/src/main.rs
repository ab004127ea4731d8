//! `stanchion`: one command at a time, across processes and machines.
//!
//! Parse ([`arguments`]), resolve and execute ([`commands`]); [`child`] is the heart.

mod arguments;
mod background;
mod child;
mod commands;
mod duration;
mod environment;
mod execution;
mod exit_code;
mod help;
mod hold;
mod limits;
mod message;
mod output;
mod process;
mod report;
mod store;
mod sys;
mod token;
mod url_mistake;
mod usage;

use std::process::ExitCode;

use crate::arguments::Arguments;
use crate::message::Verbosity;

fn main() -> ExitCode {
    let mut given = std::env::args_os().skip(1);
    if given.next().is_some_and(|argument| argument == child::guardian::ARGUMENT) && given.next().is_none() {
        child::guardian::guard();
        return ExitCode::SUCCESS;
    }
    let arguments = match Arguments::of(std::env::args_os().skip(1).collect()) {
        Ok(arguments) => arguments,
        Err(error) => return ExitCode::from(usage::answer(&error)),
    };
    let verbosity = match (arguments.common.quiet, arguments.common.verbose) {
        (true, _) => Verbosity::Quiet,
        (_, true) => Verbosity::Verbose,
        _ => Verbosity::Normal,
    };
    ExitCode::from(limits::check().and_then(|()| commands::execute(arguments, verbosity)).unwrap_or_else(|failure| {
        verbosity.problem(failure.message);
        failure.code
    }))
}
