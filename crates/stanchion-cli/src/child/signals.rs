//! Turns signals of this process into events.

use std::sync::mpsc::Sender;

use signal_hook::consts::signal::*;
use signal_hook::iterator::Signals;

use super::Event;
use crate::exit_code;
use crate::message::Failure;
use crate::sys;

/// Signals that ask for an end. Before the child runs they end the wait, then they are passed on to it.
const ENDING: [i32; 6] = [SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGUSR1, SIGUSR2];

/// Signals that are of use to the child alone, or to the stopping and continuing of both.
const OTHERS: [i32; 3] = [SIGWINCH, SIGTSTP, SIGCONT];

/// Returns whether the signal ends the wait for the key.
pub(crate) fn ends_the_wait(signal: i32) -> bool {
    ENDING.contains(&signal)
}

/// Signal settings that this process changed and the child gets back.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Inherited {
    /// SIGCHLD was ignored.
    pub(crate) ignores_chld: bool,
}

/// Sends every signal to the channel from now on.
///
/// A signal that is ignored or blocked at the start stays so, here and in the child, because our parent wanted that. Only
/// SIGCHLD must not be ignored, or the exit code of the child would be thrown away; the child gets it back ignored.
pub(crate) fn listen(events: Sender<Event>) -> Result<Inherited, Failure> {
    let inherited = Inherited { ignores_chld: sys::is_ignored(SIGCHLD) };
    let mut wanted: Vec<i32> =
        ENDING.iter().chain(&OTHERS).copied().filter(|signal| !sys::is_ignored(*signal)).collect();
    wanted.push(SIGCHLD);
    let refused = |error| Failure::new(exit_code::INTERNAL, format!("the system refused to pass on signals: {error}"));
    let mut signals = Signals::new(&wanted).map_err(refused)?;
    let forward = move || {
        for signal in signals.forever() {
            if events.send(Event::Signal(signal)).is_err() {
                break;
            }
        }
    };
    std::thread::Builder::new().name("signals".into()).spawn(forward).map_err(refused)?;
    Ok(inherited)
}
