//! Holding a key while a command runs: what `run` and `once` have in common.

use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::time::Duration;

use rustix::process::{Signal, getpid, kill_current_process_group, kill_process};
use stanchion::Clock;

use crate::child::{self, ChildPlan, Event, Exit, NotStarted, Obtained, Ran, Refusal, Released, Supervisor};
use crate::exit_code;
use crate::hold::{Hold, HoldPlan};
use crate::message::{Failure, Verbosity};
use crate::output::{for_people, limits_differ};

/// The most time a release may take once the command has ended. What is not released then is freed by the store.
const LONGEST_RELEASE: Duration = Duration::from_secs(10);

/// All of it.
#[derive(Debug)]
pub(crate) struct Plan {
    pub(crate) hold: HoldPlan,
    pub(crate) child: ChildPlan,
    /// How long the key stays closed after the command.
    pub(crate) cooldown: Option<Duration>,
    pub(crate) busy: Busy,
    pub(crate) verbosity: Verbosity,
}

/// What a key that was not obtained means.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Busy {
    pub(crate) exit_code: u8,
    /// It is worth a message.
    pub(crate) is_a_problem: bool,
}

/// Does all of it and gives the exit code. Call it on the main thread only.
pub(crate) fn execute(plan: Plan) -> Result<u8, Failure> {
    let Plan { hold, child, cooldown, busy, verbosity } = plan;
    let clock = Clock::system();
    let (sender, events) = mpsc::channel();
    let inherited = child::listen(sender.clone())?;
    let hold = Hold::ask(hold, sender.clone())?;

    let asked = clock.now();
    let obtained = match wait(&hold, &events, verbosity) {
        Waited::Obtained(obtained) => obtained,
        Waited::Signal(signal) => return Ok(exit_code::of_signal(signal)),
        Waited::Refused(Refusal::Failed(failure)) => return Err(failure),
        Waited::Refused(Refusal::Busy(message)) => {
            if busy.is_a_problem {
                verbosity.problem(message)
            } else {
                verbosity.note(message)
            }
            return Ok(busy.exit_code);
        }
        Waited::Refused(Refusal::Cancelled) => return Ok(exit_code::NOT_OBTAINED),
    };
    let start = clock.now();
    let waited = for_people(start.since(asked));
    verbosity.note(format_args!("key `{}` obtained after {waited}, fence {}", obtained.key, obtained.fence));

    let channel: (&Sender<Event>, &Receiver<Event>) = (&sender, &events);
    let ran = match Supervisor::start(&child, &hold, &obtained, inherited, channel, verbosity) {
        Ok(supervisor) => supervisor.run(),
        Err(reason) => {
            release(&hold, (None, false), &events, &clock, verbosity);
            return match reason {
                NotStarted::Signal(signal) => Ok(exit_code::of_signal(signal)),
                NotStarted::Lost(loss) => Err(Failure::new(
                    exit_code::LOST,
                    format!("key `{}` was lost before the command started: {}", obtained.key, loss.cause),
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

/// Waits for the key, or for a signal that ends the wait. Either way nothing is left in the queue.
fn wait(hold: &Hold, events: &Receiver<Event>, verbosity: Verbosity) -> Waited {
    let mut given_up = None;
    loop {
        // The signals' thread and ours have a sender: the channel does not end.
        let Ok(event) = events.recv() else { return Waited::Refused(Refusal::Cancelled) };
        match (event, given_up) {
            (Event::Signal(libc::SIGTSTP), _) if child::has_a_job_shell() => {
                let _stopped_here = kill_process(getpid(), Signal::STOP);
            }
            (Event::Signal(signal), None) if child::ends_the_wait(signal) => {
                hold.cancel();
                given_up = Some(signal);
            }
            // The second one does not wait for the store: what is left in the queue dies with the session.
            (Event::Signal(signal), Some(first)) if child::ends_the_wait(signal) => return Waited::Signal(first),
            (Event::Waiting { ahead }, None) => verbosity.note(format_args!("waiting; {ahead} before us in the queue")),
            (Event::LimitsDiffer { in_use, asked }, None) => {
                verbosity.problem(limits_differ(in_use, asked));
            }
            (Event::Obtained(obtained), None) => return Waited::Obtained(obtained),
            // Granted and given up at the same moment.
            (Event::Obtained(_), Some(_)) => hold.release(None, false),
            (Event::NotObtained(_) | Event::Released(_), Some(signal)) => return Waited::Signal(signal),
            (Event::NotObtained(refusal), None) => return Waited::Refused(refusal),
            _ => {}
        }
    }
}

/// Releases the key, says what is to be said, and finds the exit code.
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
    let key = &obtained.key;
    if let Some(loss) = ran.lost {
        let said = released.said.map(|reason| format!(" ({reason})")).unwrap_or_default();
        let message =
            format!("key `{key}` was lost while the command ran: {}{said}; the command was ended", loss.cause);
        return Err(Failure::new(exit_code::LOST, message));
    }
    if released.was_lost {
        let message = format!("key `{key}` was found lost when the command had ended; another may have run beside it");
        return Err(Failure::new(exit_code::LOST, message));
    }
    if ran.interrupted {
        // The Ctrl-C was for everything in the foreground, and only the command has seen it. A shell that runs a script
        // goes by whether we died of it.
        let _told = kill_current_process_group(Signal::INT);
        let _unreachable = signal_hook::low_level::emulate_default_handler(libc::SIGINT);
    }
    Ok(match ran.exit {
        Exit::Code(code) => code,
        Exit::Signal(signal) => exit_code::of_signal(signal),
    })
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
    let unknown = Released { was_lost: false, said: None };
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
