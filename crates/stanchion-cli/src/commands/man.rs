//! `man`: the man pages, from the definition of the arguments.

use std::io;
use std::path::Path;

use clap::CommandFactory as _;
use clap_mangen::Man;

use crate::arguments::Arguments;
use crate::exit_code;
use crate::message::{Failure, quoted};
use crate::output::print;

pub(super) fn execute(folder: Option<&Path>) -> Result<u8, Failure> {
    match folder {
        None => {
            let mut page = Vec::new();
            let written = Man::new(Arguments::command()).render(&mut page);
            written.map_err(|error| Failure::new(exit_code::INTERNAL, format!("cannot make the man page: {error}")))?;
            print(&String::from_utf8_lossy(&page))?;
        }
        Some(folder) => {
            let written = std::fs::create_dir_all(folder)
                .and_then(|()| clap_mangen::generate_to(Arguments::command().disable_help_subcommand(true), folder));
            written.map_err(|error| {
                let code = match error.kind() {
                    io::ErrorKind::PermissionDenied => exit_code::NOT_PERMITTED,
                    _ => exit_code::INTERNAL,
                };
                Failure::new(
                    code,
                    format!("cannot write man pages into `{}`: {error}", quoted(&folder.to_string_lossy())),
                )
            })?;
        }
    }
    Ok(exit_code::OK)
}
