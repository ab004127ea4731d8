//! Obtains a key, runs a command while holding it, and releases it: the common part of `run` and `once`.

use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::time::Duration;

use rustix::process::{Signal, getpid, kill_current_process_group, kill_process};
use stanchion::Clock;

use crate::child::{self, ChildPlan, Event, Exit, Left, NotStarted, Obtained, Ran, Refusal, Released, Supervisor};
use crate::environment;
use crate::exit_code;
use crate::hold::{Hold, HoldPlan};
use crate::message::{Failure, Verbosity, quoted_key};
use crate::output::for_people;

/// Maximum time of a release after the command has ended. The store frees a key that is not released by then.
const LONGEST_RELEASE: Duration = Duration::from_secs(10);

/// A command to run and the key to hold meanwhile.
#[derive(Debug)]
pub(crate) struct Plan {
    pub(crate) hold: HoldPlan,
    pub(crate) child: ChildPlan,
    /// Time for which the key stays closed after the command.
    pub(crate) cooldown: Option<Duration>,
    pub(crate) busy: Busy,
    pub(crate) verbosity: Verbosity,
}

/// Consequence of a key that was not obtained.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Busy {
    pub(crate) exit_code: u8,
    /// The user is told, also when stderr is not a terminal.
    pub(crate) is_a_problem: bool,
}

/// Carries out the plan and returns the exit code. Must be called on the main thread.
pub(crate) fn execute(plan: Plan) -> Result<u8, Failure> {
    let Plan { hold, child, cooldown, busy, verbosity } = plan;
    let clock = Clock::system();
    let (sender, events) = mpsc::channel();
    let inherited = child::listen(sender.clone())?;
    let asked_key = hold.key.clone();
    verbosity.note(format_args!("store: {}", hold.store.shown()));
    if hold.store.for_children().is_none() && !hold.store.is_default() {
        verbosity.note(
            "the store's URL holds a password, so the command does not get it: an inner `stanchion` uses another store",
        );
    }
    let hold = Hold::ask(hold, sender.clone())?;

    let asked = clock.now();
    let obtained = match wait(&hold, &asked_key, &events, verbosity) {
        Waited::Obtained(obtained) => obtained,
        Waited::Signal(signal) => {
            if signal == libc::SIGINT {
                die_of_interrupt();
            }
            return Ok(exit_code::of_signal(signal));
        }
        Waited::Refused(Refusal::Failed(failure)) => return Err(failure),
        Waited::Refused(Refusal::Busy(message)) => {
            if busy.is_a_problem {
                verbosity.problem(message)
            } else {
                verbosity.progress(message)
            }
            return Ok(busy.exit_code);
        }
        Waited::Refused(Refusal::Cancelled) => return Ok(exit_code::NOT_OBTAINED),
    };
    let start = clock.now();
    let waited = for_people(start.since(asked));
    let key = quoted_key(&obtained.key);
    verbosity.note(format_args!("key `{key}` obtained after {waited}, fence {}", obtained.fence));

    let channel: (&Sender<Event>, &Receiver<Event>) = (&sender, &events);
    let ran = match Supervisor::start(&child, &hold, &obtained, inherited, channel, verbosity) {
        Ok(supervisor) => supervisor.run(),
        Err(reason) => {
            release(&hold, (None, false), &events, &clock, verbosity);
            return match reason {
                NotStarted::Signal(signal) => Ok(exit_code::of_signal(signal)),
                NotStarted::Lost(loss) => Err(Failure::new(
                    exit_code::LOST,
                    format!("key `{key}` was lost before the command started: {}", loss.cause),
                )),
                NotStarted::Failed(failure) => Err(failure),
            };
        }
    };
    end(ran, &obtained, cooldown, &hold, &events, &clock, verbosity)
}

enum Waited {
    Obtained(Obtained),
    Refused(Refusal),
    Signal(i32),
}

/// Reports a wait for a key that a caller of this process holds, as far as its environment says.
pub(crate) fn warn_of_own_key(key: &str, verbosity: Verbosity) {
    if std::env::var_os(environment::KEY).is_some_and(|held| held == key) {
        verbosity.problem(format_args!(
            "this command already runs under key `{}` ({}): unless that key is shared or was released, it waits for itself",
            quoted_key(key),
            environment::KEY
        ));
    }
}

/// Waits for the key, or for a signal that ends the wait. Either way nothing is left in the queue.
fn wait(hold: &Hold, key: &str, events: &Receiver<Event>, verbosity: Verbosity) -> Waited {
    let mut given_up = None;
    loop {
        // The signals' thread and ours have a sender: the channel does not end.
        let Ok(event) = events.recv() else { return Waited::Refused(Refusal::Cancelled) };
        match (event, given_up) {
            (Event::Signal(libc::SIGCHLD), _) => child::reap_orphans(&[]),
            (Event::Signal(libc::SIGTSTP), _) if child::has_a_job_shell() => {
                let _ = kill_process(getpid(), Signal::STOP); // the process stops here until it is continued
            }
            (Event::Signal(signal), None) if child::ends_the_wait(signal) => {
                hold.cancel();
                given_up = Some(signal);
            }
            // A second signal does not wait for the store: the place in the queue ends with the session.
            (Event::Signal(signal), Some(first)) if child::ends_the_wait(signal) => return Waited::Signal(first),
            (Event::Waiting, None) => warn_of_own_key(key, verbosity),
            (Event::Report(report), None) => verbosity.report(report),
            (Event::Obtained(obtained), None) => return Waited::Obtained(obtained),
            // Granted and given up at the same moment.
            (Event::Obtained(_), Some(_)) => hold.release(None, false),
            (Event::NotObtained(_) | Event::Released(_), Some(signal)) => return Waited::Signal(signal),
            (Event::NotObtained(refusal), None) => return Waited::Refused(refusal),
            _ => {}
        }
    }
}

/// Releases the key, reports a loss, and returns the exit code.
fn end(
    ran: Ran,
    obtained: &Obtained,
    cooldown: Option<Duration>,
    hold: &Hold,
    events: &Receiver<Event>,
    clock: &Clock,
    verbosity: Verbosity,
) -> Result<u8, Failure> {
    let released = release(hold, (cooldown, ran.exit == Exit::Code(0)), events, clock, verbosity);
    ran.guardian.dismiss();
    let key = quoted_key(&obtained.key);
    if let Some(loss) = ran.lost {
        let explanation = released.explanation.map(|reason| format!(" ({reason})")).unwrap_or_default();
        let (code, became) = match ran.left {
            Left::Nothing => (exit_code::LOST, "the command was ended"),
            Left::RanOn => {
                (exit_code::LOST, "the command could not be ended and ran on; another may have run beside it")
            }
            Left::RunsOn => (
                exit_code::NOT_PERMITTED,
                "processes of the command could not be ended and run on; another command may run beside them",
            ),
        };
        let message = format!("key `{key}` was lost while the command ran: {}{explanation}; {became}", loss.cause);
        return Err(Failure::new(code, message));
    }
    if released.was_lost {
        let message = format!("key `{key}` was found lost when the command had ended; another may have run beside it");
        return Err(Failure::new(exit_code::LOST, message));
    }
    if ran.interrupted {
        // The Ctrl-C was for everything in the foreground, and only the command has seen it. A shell that runs a script
        // goes by whether we died of it.
        let _ = kill_current_process_group(Signal::INT); // the others of the group may be gone
        die_of_interrupt();
    }
    Ok(match ran.exit {
        Exit::Code(code) => code,
        Exit::Signal(signal) => exit_code::of_signal(signal),
    })
}

/// Dies of SIGINT, because a shell that runs a script goes on with the next line after a command that only exits with 130.
/// Comes back in the first process of a container: it cannot die of a signal.
fn die_of_interrupt() {
    if std::process::id() != 1 {
        let _ = signal_hook::low_level::emulate_default_handler(libc::SIGINT);
    }
}

/// Releases the key.
fn release(
    hold: &Hold,
    (cooldown, succeeded): (Option<Duration>, bool),
    events: &Receiver<Event>,
    clock: &Clock,
    verbosity: Verbosity,
) -> Released {
    hold.release(cooldown, succeeded);
    let unknown = Released { was_lost: false, explanation: None };
    let until = clock.now().after(LONGEST_RELEASE);
    loop {
        match events.recv_timeout(until.since(clock.now())) {
            Ok(Event::Released(Ok(released))) => {
                verbosity.note("key released");
                return released;
            }
            Ok(Event::Released(Err(failure))) => {
                let reason = failure.message;
                verbosity
                    .problem(format_args!("the key could not be released now, the store frees it later: {reason}"));
                return unknown;
            }
            Ok(Event::Signal(libc::SIGINT | libc::SIGTERM)) | Err(RecvTimeoutError::Timeout) => {
                verbosity.problem("the store did not confirm the release; it frees the key when the session ends");
                return unknown;
            }
            Ok(_) => {}
            Err(RecvTimeoutError::Disconnected) => return unknown,
        }
    }
}
