//! Shows on a terminal what is being measured.

use std::io::{IsTerminal as _, Write as _};
use std::time::Duration;

use stanchion::Clock;

use crate::message::{Failure, Verbosity};
use crate::output::for_people;
use crate::store::pause;

/// A line that is written over and over, on a terminal only.
#[derive(Debug)]
pub(super) struct Progress {
    is_shown: bool,
}

impl Progress {
    pub(super) fn new(verbosity: Verbosity) -> Self {
        Self { is_shown: verbosity != Verbosity::Quiet && std::io::stderr().is_terminal() }
    }

    /// Shows a measurement and its remaining time until the work is done.
    pub(super) async fn during<T>(
        &self,
        what: &str,
        length: Duration,
        work: impl Future<Output = Result<T, Failure>>,
    ) -> Result<T, Failure> {
        let clock = Clock::system();
        let end = clock.now().after(length);
        let show = async {
            loop {
                // Rounded up, so that the last second is not shown as none.
                let left = Duration::from_secs(end.since(clock.now()).as_secs_f64().ceil() as u64);
                self.write(&format!("stanchion: measuring {what}; {} left", for_people(left)));
                pause(Duration::from_secs(1)).await;
            }
        };
        tokio::select! {
            biased;
            done = work => done,
            never = show => never,
        }
    }

    pub(super) fn clear(&self) {
        self.write("");
    }

    fn write(&self, line: &str) {
        if self.is_shown {
            // To the beginning of the line, and after the text erase the rest.
            let _ = write!(std::io::stderr().lock(), "\r{line}\x1b[K"); // the terminal may be gone
        }
    }
}
