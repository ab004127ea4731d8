//! Checks that the system allows enough descriptors, before anything is begun.

use rustix::fs::{Mode, OFlags};

use crate::exit_code;
use crate::message::Failure;

/// Number of descriptors that the tool opens for its runtimes, the store and the command.
const DESCRIPTORS: usize = 48;

/// Returns an error if too few descriptors are allowed: the libraries below panic without them, and the middle of a run is the
/// wrong time to fail.
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
        // Without /dev/null there is nothing to try.
        _ => Ok(()),
    }
}
