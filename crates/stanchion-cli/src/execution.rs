//! Obtains keys, runs a command while holding them, and releases them: the common part of `run`, `once` and `elect`.

use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::time::Duration;

use rustix::process::{Signal, getpid, kill_current_process_group, kill_process};
use stanchion::{Clock, Key};

use crate::child::{
    self, ChildPlan, Event, Exit, Inherited, Left, NotStarted, Obtained, Ran, Refusal, Released, Supervisor,
};
use crate::environment;
use crate::exit_code;
use crate::hold::{Hold, HoldPlan};
use crate::message::{Failure, Verbosity, quoted_key};
use crate::output::for_people;

/// Maximum time of a release after the command has ended. The store frees a key that is not released by then.
const LONGEST_RELEASE: Duration = Duration::from_secs(10);

/// A command to run and the keys to hold meanwhile.
#[derive(Debug)]
pub(crate) struct Plan {
    pub(crate) hold: HoldPlan,
    pub(crate) child: ChildPlan,
    /// Time for which the keys stay closed after the command.
    pub(crate) cooldown: Option<Duration>,
    pub(crate) busy: Busy,
    /// After a loss, request the keys and run the command again.
    pub(crate) runs_again: bool,
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
    let Plan { hold, child, cooldown, busy, runs_again, verbosity } = plan;
    let (sender, events) = mpsc::channel();
    let inherited = child::listen(sender.clone())?;
    verbosity.note(format_args!("store: {}", hold.store.shown()));
    if hold.store.is_kept_from_children() {
        verbosity.note(
            "the store's URL holds a password, so the command does not get it: an inner `stanchion` uses another store",
        );
    }
    let hold = Hold::ask(hold, sender.clone())?;
    let execution =
        Execution { hold, child, cooldown, busy, inherited, sender, events, clock: Clock::system(), verbosity };
    loop {
        match execution.run_once()? {
            Outcome::Ended(code) => return Ok(code),
            Outcome::Lost(loss) if runs_again => {
                verbosity.problem(format_args!("{}; waiting for the key again", loss.message));
                execution.hold.ask_again()?;
            }
            Outcome::Lost(loss) => return Err(loss),
        }
    }
}

/// A plan that is being carried out.
struct Execution {
    hold: Hold,
    child: ChildPlan,
    cooldown: Option<Duration>,
    busy: Busy,
    inherited: Inherited,
    sender: Sender<Event>,
    events: Receiver<Event>,
    clock: Clock,
    verbosity: Verbosity,
}

/// The outcome of one request for the keys.
enum Outcome {
    /// There is nothing more to do.
    Ended(u8),
    /// A key was lost, and nothing of the command is left.
    Lost(Failure),
}

enum Waited {
    Obtained(Obtained),
    Refused(Refusal),
    Signal(i32),
}

impl Execution {
    /// Obtains the keys, runs the command and releases the keys.
    fn run_once(&self) -> Result<Outcome, Failure> {
        let asked = self.clock.now();
        let obtained = match self.wait() {
            Waited::Obtained(obtained) => obtained,
            Waited::Signal(signal) => {
                if signal == libc::SIGINT {
                    die_of_interrupt();
                }
                return Ok(Outcome::Ended(exit_code::of_signal(signal)));
            }
            Waited::Refused(Refusal::Failed(failure)) => return Err(failure),
            Waited::Refused(Refusal::Busy(message)) => {
                if self.busy.is_a_problem {
                    self.verbosity.problem(message)
                } else {
                    self.verbosity.progress(message)
                }
                return Ok(Outcome::Ended(self.busy.exit_code));
            }
            Waited::Refused(Refusal::Cancelled) => return Ok(Outcome::Ended(exit_code::NOT_OBTAINED)),
        };
        let waited = for_people(self.clock.now().since(asked));
        for held in &obtained.keys {
            let key = quoted_key(held.key.name());
            self.verbosity.note(format_args!("key `{key}` obtained after {waited}, fence {}", held.fence));
        }

        let channel = (&self.sender, &self.events);
        match Supervisor::start(&self.child, &self.hold, &obtained, self.inherited, channel, self.verbosity) {
            Ok(supervisor) => self.end(supervisor.run(), &obtained),
            Err(reason) => {
                let (_, was_interrupted) = self.release(None, false);
                match reason {
                    NotStarted::Signal(signal) => Ok(Outcome::Ended(exit_code::of_signal(signal))),
                    NotStarted::Lost(loss) => {
                        let key = obtained.shown(&loss);
                        let message = format!("key `{key}` was lost before the command started: {}", loss.cause);
                        lost(Failure::new(exit_code::LOST, message), was_interrupted)
                    }
                    NotStarted::Failed(failure) => Err(failure),
                }
            }
        }
    }

    /// Waits for the keys, or for a signal that ends the wait. Either way nothing is left in the queue.
    fn wait(&self) -> Waited {
        let mut given_up = None;
        loop {
            // The signals' thread and ours have a sender: the channel does not end.
            let Ok(event) = self.events.recv() else { return Waited::Refused(Refusal::Cancelled) };
            match (event, given_up) {
                (Event::Signal(libc::SIGCHLD), _) => child::reap_orphans(&[]),
                (Event::Signal(libc::SIGTSTP), _) if child::has_a_job_shell() => {
                    let _ = kill_process(getpid(), Signal::STOP); // the process stops here until it is continued
                }
                (Event::Signal(signal), None) if child::ends_the_wait(signal) => {
                    self.hold.cancel();
                    given_up = Some(signal);
                }
                // A second signal does not wait for the store: the place in the queue ends with the session.
                (Event::Signal(signal), Some(first)) if child::ends_the_wait(signal) => return Waited::Signal(first),
                (Event::Waiting(key), None) => warn_of_own_key(&key, self.verbosity),
                (Event::Report(report), None) => self.verbosity.report(report),
                (Event::Obtained(obtained), None) => return Waited::Obtained(obtained),
                // Granted and given up at the same moment.
                (Event::Obtained(_), Some(_)) => self.hold.release(None, false),
                (Event::NotObtained(_) | Event::Released(_), Some(signal)) => return Waited::Signal(signal),
                (Event::NotObtained(refusal), None) => return Waited::Refused(refusal),
                _ => {}
            }
        }
    }

    /// Releases the keys, and returns the exit code or the loss.
    fn end(&self, ran: Ran, obtained: &Obtained) -> Result<Outcome, Failure> {
        let (released, was_interrupted) = self.release(self.cooldown, ran.exit == Exit::Code(0));
        ran.guardian.dismiss();
        let own_code = match ran.exit {
            Exit::Code(code) => code,
            Exit::Signal(signal) => exit_code::of_signal(signal),
        };
        if let Some(loss) = ran.lost {
            let key = obtained.shown(&loss);
            let explanation = released.explanation.map(|reason| format!(" ({reason})")).unwrap_or_default();
            let was_lost = format!("key `{key}` was lost while the command ran: {}{explanation}", loss.cause);
            return match ran.left {
                Left::Nothing => lost(
                    Failure::new(exit_code::LOST, format!("{was_lost}; the command was ended")),
                    was_interrupted || ran.asked_to_end,
                ),
                Left::LetRun => Err(Failure::new(
                    exit_code::LOST,
                    format!(
                        "{was_lost}; the command ran on, and exited with {own_code}; another may have run beside it"
                    ),
                )),
                Left::RanOn => Err(Failure::new(
                    exit_code::LOST,
                    format!("{was_lost}; the command could not be ended and ran on; another may have run beside it"),
                )),
                Left::RunsOn => Err(Failure::new(
                    exit_code::NOT_PERMITTED,
                    format!(
                        "{was_lost}; processes of the command could not be ended and run on; another command may run \
                         beside them"
                    ),
                )),
            };
        }
        if released.was_lost {
            let names: Vec<_> = obtained.keys.iter().map(|held| format!("`{}`", quoted_key(held.key.name()))).collect();
            let which = if names.len() == 1 { "key" } else { "one of the keys" };
            let message = format!(
                "{which} {} was found lost when the command had ended; another may have run beside it",
                names.join(", ")
            );
            return Err(Failure::new(exit_code::LOST, message));
        }
        if ran.interrupted {
            // The Ctrl-C was for everything in the foreground, and only the command has seen it. A shell that runs a
            // script goes by whether we died of it.
            let _ = kill_current_process_group(Signal::INT); // the others of the group may be gone
            die_of_interrupt();
        }
        Ok(Outcome::Ended(own_code))
    }

    /// Releases the keys. Returns too whether a signal asked for an end meanwhile.
    fn release(&self, cooldown: Option<Duration>, succeeded: bool) -> (Released, bool) {
        self.hold.release(cooldown, succeeded);
        let unknown = Released { was_lost: false, explanation: None };
        let until = self.clock.now().after(LONGEST_RELEASE);
        loop {
            let event = self.events.recv_timeout(until.since(self.clock.now()));
            match event {
                Ok(Event::Released(Ok(released))) => {
                    self.verbosity.note("key released");
                    return (released, false);
                }
                Ok(Event::Released(Err(failure))) => {
                    let reason = failure.message;
                    self.verbosity
                        .problem(format_args!("the key could not be released now, the store frees it later: {reason}"));
                    return (unknown, false);
                }
                Ok(Event::Signal(libc::SIGINT | libc::SIGTERM)) | Err(RecvTimeoutError::Timeout) => {
                    self.verbosity
                        .problem("the store did not confirm the release; it frees the key when the session ends");
                    return (unknown, event.is_ok());
                }
                Ok(_) => {}
                Err(RecvTimeoutError::Disconnected) => return (unknown, false),
            }
        }
    }
}

/// A loss after which the command may run again, unless a signal asked for an end.
fn lost(loss: Failure, asked_to_end: bool) -> Result<Outcome, Failure> {
    if asked_to_end { Err(loss) } else { Ok(Outcome::Lost(loss)) }
}

/// Reports a wait for a key that a caller of this process holds, as far as its environment says.
pub(crate) fn warn_of_own_key(key: &Key, verbosity: Verbosity) {
    if runs_under(key) {
        verbosity.problem(format_args!(
            "this command already runs under key `{}` ({}): unless that key is shared or was released, it waits for itself",
            quoted_key(key.name()),
            environment::KEY
        ));
    }
}

/// Returns whether a command that holds this key has started this process, as far as its environment says.
fn runs_under(key: &Key) -> bool {
    let variable = |name| std::env::var(name).unwrap_or_default();
    let held = variable(environment::KEY);
    (held == key.name() || held.lines().any(|name| name == key.name()))
        && variable(environment::NAMESPACE) == key.namespace()
}

/// Dies of SIGINT, because a shell that runs a script goes on with the next line after a command that only exits with 130.
/// Comes back in the first process of a container: it cannot die of a signal.
fn die_of_interrupt() {
    if std::process::id() != 1 {
        let _ = signal_hook::low_level::emulate_default_handler(libc::SIGINT);
    }
}
