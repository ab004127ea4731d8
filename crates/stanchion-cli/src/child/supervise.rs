//! Supervises the child from its start to its end, in one loop over events.

use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::time::Duration;

use rustix::io::Errno;
use rustix::process::{
    Pid, Signal, getpid, kill_current_process_group, kill_process, kill_process_group, test_kill_process_group,
};
use stanchion::{BootTime, Clock, LossCause};

use super::guardian::Guardian;
use super::ready::ReadyFile;
use super::signals::{Inherited, ends_the_wait};
use super::spawn::{self, Surroundings};
use super::terminal::{Terminal, has_a_job_shell};
use super::{ChildPlan, Event, Exit, Loss, Obtained, OnLost};
use crate::hold::Hold;
use crate::message::{Failure, Verbosity, quoted};

/// Minimum time between the child's SIGKILL and the moment at which another process may have the key.
const LEAST_MARGIN: Duration = Duration::from_millis(20);

/// Maximum time to wait for processes that were sent SIGKILL to be gone.
const LONGEST_DEATH: Duration = Duration::from_secs(2);

/// Maximum time between two looks at the clock: timers stop while the machine sleeps.
const LONGEST_NAP: Duration = Duration::from_secs(1);

/// A running child.
pub(crate) struct Supervisor<'a> {
    plan: &'a ChildPlan,
    hold: &'a Hold,
    obtained: &'a Obtained,
    events: &'a Receiver<Event>,
    verbosity: Verbosity,
    clock: Clock,
    /// The child; its process group has the same number.
    child: Pid,
    guardian: Guardian,
    terminal: Option<Terminal>,
    /// The child wants the terminal when we have it.
    wants_terminal: bool,
    is_stopped: bool,
    /// We were asked to stop, and do so when the child has stopped.
    stops_with_child: bool,
    /// Stop signals on their way to us that we sent to our own group.
    own_stops: u32,
    /// INT or TERM was passed on.
    asked_to_end: bool,
    /// The first loss.
    lost: Option<Loss>,
    ready_file: Option<ReadyFile>,
    kill_at: Option<BootTime>,
    refused: Refused,
}

/// Whether the system refused to signal or to end the command, as far as that was reported.
#[derive(Clone, Copy, Debug, Default)]
struct Refused {
    /// A signal could not be sent, and that was reported.
    signal: bool,
    /// The command could not be ended after the loss, and that was reported.
    end: bool,
}

/// Why no child was started.
pub(crate) enum NotStarted {
    /// This signal asked for an end.
    Signal(i32),
    /// The key was lost before.
    Lost(Loss),
    /// It cannot be started.
    Failed(Failure),
}

impl From<Failure> for NotStarted {
    fn from(failure: Failure) -> Self {
        Self::Failed(failure)
    }
}

/// The result of a run of the child.
pub(crate) struct Ran {
    pub(crate) exit: Exit,
    pub(crate) lost: Option<Loss>,
    /// The processes that were not ended after a loss.
    pub(crate) left: Left,
    /// It died of a Ctrl-C at a terminal that was its own.
    pub(crate) interrupted: bool,
    /// This process was asked to end.
    pub(crate) asked_to_end: bool,
    /// To be dismissed when everything else is done.
    pub(crate) guardian: Guardian,
}

/// The processes left of a command that was to be ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Left {
    /// Nothing: it was ended.
    Nothing,
    /// Nothing now. It was not to be ended, and ran to its own end.
    LetRun,
    /// Nothing now. It could not be ended, and ran to its own end.
    RanOn,
    /// Processes that could not be ended run on.
    RunsOn,
}

impl<'a> Supervisor<'a> {
    /// Starts the child. Call it on the main thread only.
    pub(crate) fn start(
        plan: &'a ChildPlan,
        hold: &'a Hold,
        obtained: &'a Obtained,
        inherited: Inherited,
        channel: (&Sender<Event>, &'a Receiver<Event>),
        verbosity: Verbosity,
    ) -> Result<Self, NotStarted> {
        let (sender, events) = channel;
        let guardian = Guardian::start()?;
        let mut terminal = Terminal::open();
        let to_be_given = terminal.as_ref().is_some_and(Terminal::is_to_be_given_at_start);
        // The last look: later events find the child registered.
        let refusal = events.try_iter().find_map(|event| match event {
            Event::Signal(signal) if ends_the_wait(signal) => Some(NotStarted::Signal(signal)),
            Event::Lost(loss) => Some(NotStarted::Lost(loss)),
            _ => None,
        });
        if let Some(refusal) = refusal {
            guardian.dismiss();
            return Err(refusal);
        }
        let surroundings = Surroundings {
            obtained,
            registration: guardian.registration(),
            terminal: terminal.as_ref().filter(|_| to_be_given).map(Terminal::device),
            ignores_chld: inherited.ignores_chld,
        };
        let spawned = spawn::spawn(plan, &surroundings);
        if let (true, Some(terminal)) = (to_be_given, &mut terminal) {
            terminal.was_given();
        }
        let child = match spawned {
            Ok(child) => child,
            Err(failure) => {
                guardian.all_is_well();
                guardian.dismiss();
                terminal.iter_mut().for_each(Terminal::take_back);
                return Err(failure.into());
            }
        };
        let mut supervisor = Self {
            plan,
            hold,
            obtained,
            events,
            verbosity,
            clock: Clock::system(),
            child,
            guardian,
            terminal,
            wants_terminal: to_be_given,
            is_stopped: false,
            stops_with_child: false,
            own_stops: 0,
            asked_to_end: false,
            lost: None,
            ready_file: None,
            kill_at: None,
            refused: Refused::default(),
        };
        if let Err(failure) = spawn::watch(child, sender.clone()) {
            supervisor.signal(Signal::KILL);
            let _ = supervisor.finish(Exit::Signal(libc::SIGKILL)); // it may have ended by itself
            return Err(failure.into());
        }
        supervisor.report_ready();
        Ok(supervisor)
    }

    fn report_ready(&mut self) {
        let Some(path) = &self.plan.ready_file else { return };
        match ReadyFile::create(path, &format!("{}\n", spawn::lines(self.obtained, |held| held.fence.to_string()))) {
            Ok(file) => self.ready_file = Some(file),
            Err(error) => {
                let path = quoted(&path.to_string_lossy());
                self.verbosity.problem(format_args!("cannot write `{path}`, and the command runs without it: {error}"));
            }
        }
    }

    /// Whether the command is being ended because of a loss.
    fn is_ending(&self) -> bool {
        self.lost.is_some() && self.plan.on_lost != OnLost::Ignore
    }

    /// Supervises the child until it ends.
    pub(crate) fn run(mut self) -> Ran {
        loop {
            match self.next_event() {
                None => {
                    self.verbosity.note("the command did not end in time: SIGKILL");
                    self.signal(Signal::KILL);
                    self.kill_at = None;
                }
                Some(Event::Signal(signal)) => self.on_signal(signal),
                Some(Event::Stopped(signal)) => self.on_stop(signal),
                Some(Event::Lost(loss)) => self.on_loss(loss),
                Some(Event::Exited(exit)) => return self.finish(exit),
                Some(Event::Report(report)) => self.verbosity.report(report),
                Some(Event::Waiting(_) | Event::Obtained(_) | Event::NotObtained(_) | Event::Released(_)) => {}
            }
        }
    }

    /// Returns the next event, or `None` when it is time to kill.
    fn next_event(&self) -> Option<Event> {
        loop {
            let nap = match self.kill_at {
                Some(at) => at.since(self.clock.now()),
                None => LONGEST_NAP,
            };
            if nap.is_zero() {
                return None;
            }
            match self.events.recv_timeout(nap.min(LONGEST_NAP)) {
                Ok(event) => return Some(event),
                Err(RecvTimeoutError::Timeout) => {}
                // The caller has a sender, so this cannot happen. To kill is the safe answer.
                Err(RecvTimeoutError::Disconnected) => return None,
            }
        }
    }

    fn on_signal(&mut self, signal: i32) {
        match signal {
            libc::SIGCHLD => spawn::reap_orphans(&self.own_processes()),
            libc::SIGCONT => self.resume(),
            libc::SIGTSTP if self.own_stops > 0 => self.own_stops -= 1,
            libc::SIGTSTP => {
                self.signal(Signal::TSTP);
                if has_a_job_shell() {
                    self.stops_with_child = true;
                } else {
                    // No shell would continue the command. This does not wait until its stop is seen: a shell that is
                    // starting a program with vfork cannot stop, but the program does.
                    self.signal(Signal::CONT);
                }
            }
            libc::SIGINT | libc::SIGTERM if self.asked_to_end || self.is_ending() => {
                self.asked_to_end = true;
                self.verbosity.note("asked to end for the second time: SIGKILL");
                self.signal(Signal::KILL);
            }
            _ => {
                self.asked_to_end |= matches!(signal, libc::SIGINT | libc::SIGTERM);
                if let Some(signal) = Signal::from_named_raw(signal) {
                    self.signal(signal);
                }
                // A stopped command would never learn of it.
                if self.is_stopped && signal != libc::SIGWINCH {
                    self.signal(Signal::CONT);
                    self.is_stopped = false;
                }
            }
        }
    }

    /// The child was stopped: by Ctrl-Z, because it needs the terminal, or by somebody.
    fn on_stop(&mut self, signal: i32) {
        self.is_stopped = true;
        if self.is_ending() {
            return self.continue_child();
        }
        let asks_for_terminal = matches!(signal, libc::SIGTTIN | libc::SIGTTOU);
        match &mut self.terminal {
            Some(terminal) if asks_for_terminal && !terminal.is_given() => {
                self.wants_terminal = true;
                if terminal.give(self.child) {
                    self.continue_child();
                } else {
                    // We are in the background too: stop as any job does there, until the shell says `fg`.
                    self.stop_too(false);
                }
            }
            Some(terminal) if terminal.is_given() && !asks_for_terminal => {
                terminal.take_back();
                self.stop_too(signal == libc::SIGTSTP);
            }
            _ if self.stops_with_child => self.stop_too(false),
            // It was stopped before it was asked to end, and we hear of it after that.
            _ if self.asked_to_end => self.continue_child(),
            // Somebody stopped the command alone, and will continue it.
            _ => {}
        }
    }

    /// Stops this process as its child was stopped, for the shell to see; or goes on if no shell would continue us.
    fn stop_too(&mut self, with_our_group: bool) {
        if !has_a_job_shell() {
            return self.resume();
        }
        if with_our_group {
            // The others of our pipeline would have been stopped by the same key.
            self.own_stops += 1;
            let _ = kill_current_process_group(Signal::TSTP); // the process may be alone in its group
        }
        let _ = kill_process(getpid(), Signal::STOP); // the process stops here until it is continued
    }

    /// This process runs again.
    fn resume(&mut self) {
        self.stops_with_child = false;
        if self.is_ending() {
            return;
        }
        if self.lost.is_none()
            && let Some(key) = self.hold.lost_key()
        {
            // It was lost while this process was stopped. The child must not run on for a moment.
            self.on_loss(Loss { key, cause: LossCause::SessionExpired, left: Some(Duration::ZERO) });
            if self.is_ending() {
                return;
            }
        }
        if let (true, Some(terminal)) = (self.wants_terminal, &mut self.terminal) {
            terminal.give(self.child);
        }
        self.continue_child();
    }

    fn continue_child(&mut self) {
        self.is_stopped = false;
        self.signal(Signal::CONT);
    }

    fn on_loss(&mut self, loss: Loss) {
        self.ready_file = None;
        let is_first = self.lost.is_none();
        self.lost.get_or_insert(loss);
        let grace = match self.plan.on_lost {
            OnLost::Term => grace(self.plan.kill_after, &loss),
            OnLost::Kill => Duration::ZERO,
            OnLost::Ignore if is_first => {
                return self.verbosity.problem(format_args!(
                    "key `{}` was lost ({}); the command runs on without it (--on-lost ignore), and another may run \
                     beside it",
                    self.obtained.shown(&loss),
                    loss.cause
                ));
            }
            OnLost::Ignore => return,
        };
        let kill_at = self.clock.now().after(grace);
        if grace.is_zero() {
            self.signal(Signal::KILL);
            self.kill_at = None;
        } else if is_first {
            self.signal(Signal::TERM);
            self.continue_child();
            self.kill_at = Some(kill_at);
        } else {
            // Another key is lost too, and may be free sooner.
            self.kill_at = self.kill_at.map(|planned| planned.min(kill_at));
        }
    }

    fn finish(mut self, exit: Exit) -> Ran {
        self.ready_file = None;
        if self.is_ending() {
            // The child is not reaped: the group is still ours.
            self.signal(Signal::KILL);
        }
        self.guardian.all_is_well();
        spawn::reap(self.child);
        let left = match self.lost {
            Some(_) if !self.is_ending() => Left::LetRun,
            Some(_) if self.runs_on() => Left::RunsOn,
            Some(_) if self.refused.end => Left::RanOn,
            _ => Left::Nothing,
        };
        let mut interrupted = false;
        if let Some(terminal) = &mut self.terminal {
            interrupted = terminal.is_given() && exit == Exit::Signal(libc::SIGINT);
            let was_given = terminal.is_given();
            terminal.take_back();
            if was_given && matches!(exit, Exit::Signal(_)) {
                terminal.restore_modes();
            }
        }
        let asked_to_end = self.asked_to_end;
        Ran { exit, lost: self.lost, left, interrupted, asked_to_end, guardian: self.guardian }
    }

    /// Sends the signal to the whole group.
    fn signal(&mut self, signal: Signal) {
        match kill_process_group(self.child, signal) {
            // An error says that nobody is left there.
            Ok(()) | Err(Errno::SRCH) => {}
            Err(cause) => self.on_refusal(cause),
        }
    }

    /// The system refuses to send the command a signal: it runs as another user, as after sudo.
    fn on_refusal(&mut self, cause: Errno) {
        let lost = self.lost.filter(|_| self.is_ending() && !self.refused.end);
        if let Some(loss) = lost {
            self.refused.end = true;
            self.verbosity.problem(format_args!(
                "key `{}` was lost ({}) and the command cannot be ended, because it runs as another user: {cause}; \
                 another command may run beside it",
                self.obtained.shown(&loss),
                loss.cause
            ));
        } else if !self.is_ending() && !self.refused.signal {
            self.refused.signal = true;
            self.verbosity.problem(format_args!(
                "signals cannot be passed on to the command, because it runs as another user: {cause}"
            ));
        }
    }

    /// Whether something of the group lives on, after SIGKILL was sent and the child was reaped.
    fn runs_on(&self) -> bool {
        let until = self.clock.now().after(LONGEST_DEATH);
        loop {
            match test_kill_process_group(self.child) {
                Err(Errno::SRCH) => return false,
                Err(_) => return true,
                // They die, or are dead and not reaped yet. A leftover that is another user's may stand behind these.
                Ok(()) if !group_lives(self.child) => return false,
                Ok(()) if self.clock.now() >= until => return true,
                Ok(()) => std::thread::sleep(Duration::from_millis(1)),
            }
        }
    }

    /// The children of this process that have an owner here.
    fn own_processes(&self) -> [Pid; 2] {
        let guardian = i32::try_from(self.guardian.id()).ok().and_then(Pid::from_raw);
        [self.child, guardian.unwrap_or(self.child)]
    }
}

/// Whether a process of the group lives; the dead that nobody has reaped do not count. Yes if there is no telling.
fn group_lives(group: Pid) -> bool {
    let Ok(entries) = std::fs::read_dir("/proc") else { return true };
    entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok()).any(|pid| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        // The name of the program, in brackets, may hold anything.
        let mut fields = stat.rsplit_once(')').map_or("", |(_, rest)| rest).split_whitespace();
        let is_dead = fields.next().is_none_or(|state| matches!(state, "Z" | "X"));
        !is_dead && fields.nth(1).and_then(|number| number.parse().ok()) == Some(group.as_raw_pid())
    })
}

/// The time between TERM and KILL.
fn grace(kill_after: Duration, loss: &Loss) -> Duration {
    let left = match loss.cause {
        // Another may have it already.
        LossCause::ForceReleased | LossCause::Missing => Duration::ZERO,
        // A hold without a deadline that is lost all the same: nothing protects it.
        _ => loss.left.unwrap_or_default(),
    };
    kill_after.min(left.saturating_sub(LEAST_MARGIN.max(left / 10)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kill_comes_before_the_key_is_free() {
        let second = Duration::from_secs(1);
        let loss = |cause, left| Loss { key: 0, cause, left };
        assert_eq!(grace(5 * second, &loss(LossCause::SessionExpired, Some(2 * second))), Duration::from_millis(1800));
        assert_eq!(grace(second, &loss(LossCause::SessionExpired, Some(2 * second))), second);
        assert_eq!(grace(5 * second, &loss(LossCause::SessionExpired, None)), Duration::ZERO);
        assert_eq!(grace(5 * second, &loss(LossCause::MaxHold, Some(Duration::from_millis(15)))), Duration::ZERO);
        assert_eq!(grace(5 * second, &loss(LossCause::ForceReleased, None)), Duration::ZERO);
        assert_eq!(grace(Duration::ZERO, &loss(LossCause::MaxHold, Some(second))), Duration::ZERO);
    }
}
