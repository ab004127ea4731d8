//! `completions`: for a shell, from the definition of the arguments.

use clap::CommandFactory as _;
use clap_complete::Shell;

use crate::arguments::Arguments;
use crate::exit_code;
use crate::message::Failure;
use crate::output::print;

pub(super) fn execute(shell: Shell) -> Result<u8, Failure> {
    let mut text = Vec::new();
    clap_complete::generate(shell, &mut Arguments::command(), "stanchion", &mut text);
    print(&String::from_utf8_lossy(&text))?;
    Ok(exit_code::OK)
}
