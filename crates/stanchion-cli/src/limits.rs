//! Checks that the system allows enough descriptors, before anything is begun.

use rustix::fs::{Mode, OFlags};

use crate::exit_code;
use crate::message::Failure;

/// Descriptors that the tool opens beside those that it is started with: of its runtimes, the store and the command.
const DESCRIPTORS: usize = 48;

/// Refuses to begin with too few descriptors: the libraries below panic without them, and half-way is the wrong time to fail.
pub(crate) fn check() -> Result<(), Failure> {
    let opened = rustix::fs::open("/dev/null", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
    let all = opened.and_then(|first| {
        (1..DESCRIPTORS).map(|_| rustix::io::fcntl_dupfd_cloexec(&first, 3)).collect::<Result<Vec<_>, _>>()
    });
    match all {
        Err(cause @ (rustix::io::Errno::MFILE | rustix::io::Errno::NFILE | rustix::io::Errno::INVAL)) => {
            let message =
                format!("{DESCRIPTORS} more open files are needed than the system allows ({cause}): raise `ulimit -n`");
            Err(Failure::new(exit_code::INTERNAL, message))
        }
        // Without a /dev/null nothing can be told.
        _ => Ok(()),
    }
}
