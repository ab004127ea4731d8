//! Runs the thread that obtains the key, notices its loss, and releases it. It sends [`Event`]s and takes commands.

use std::future::poll_fn;
use std::panic::AssertUnwindSafe;
use std::pin::pin;
use std::sync::mpsc::{self, Sender};
use std::task::Poll;
use std::time::Duration;

use stanchion::store::Demand;
use stanchion::{
    BootTime, Clock, ErrorKind, EventStream, Guard, Guards, Key, KeyRequest, LossCause, OnceGuard, OnceOutcome,
};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio_util::sync::CancellationToken;

use crate::child::{Event, HeldKey, Loss, Obtained, Refusal, Released};
use crate::exit_code;
use crate::message::{Failure, quoted_key};
use crate::output::{escape, for_people, limits_differ};
use crate::report::{HoldReport, Report, WaitReport, describe};
use crate::store::{NO_WAIT_WITHIN, Opened, StoreChoice, close, pause, silent, within};

/// Maximum time for finding out who has the key, once it was not obtained.
const LOOK_WITHIN: Duration = Duration::from_millis(200);

/// Pause of a candidate that has led before, while the store is away.
const ASK_AGAIN_AFTER: Duration = Duration::from_secs(1);

/// Keys to hold, with their options.
#[derive(Debug)]
pub(crate) struct HoldPlan {
    pub(crate) store: StoreChoice,
    /// At least one, each once: all or nothing. `once` has one.
    pub(crate) keys: Vec<Key>,
    pub(crate) demand: Demand,
    /// Maximum wait: `None` for no limit, zero for one attempt.
    pub(crate) wait: Option<Duration>,
    pub(crate) ttl: Option<Duration>,
    /// Fixed lifetime of the hold, which does not depend on this process. For one key.
    pub(crate) lifetime: Option<Duration>,
    pub(crate) max_hold: Option<Duration>,
    pub(crate) metadata: Option<String>,
    /// The schedule of `once`.
    pub(crate) once: Option<Schedule>,
    /// Label of this process that others see with the hold.
    pub(crate) owner: String,
    /// Time after which the wait is described, or `None` if nobody reads that.
    pub(crate) describe_wait_after: Option<Duration>,
    /// The command is ended when a key is lost.
    pub(crate) loss_ends_command: bool,
}

/// The schedule of `once`: at least one of the two is there.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Schedule {
    pub(crate) every: Option<Duration>,
    pub(crate) slot: Option<u64>,
    /// Whether the command runs even if the schedule says that it was done.
    pub(crate) is_forced: bool,
}

impl HoldPlan {
    /// Returns the place of the key among the keys.
    fn place(&self, key: &Key) -> usize {
        self.keys.iter().position(|one| one == key).unwrap_or_default()
    }

    /// Returns what is left of the wait limit.
    fn left_to_wait(&self, started: BootTime) -> Option<Duration> {
        self.wait.map(|limit| limit.saturating_sub(Clock::system().now().since(started)))
    }

    /// Returns what is left of the time in which a store answers that is not waited for.
    fn left_to_answer(&self, started: BootTime) -> Duration {
        NO_WAIT_WITHIN.saturating_sub(Clock::system().now().since(started))
    }

    /// How long opening the store may take: `None` for the library's default. A wait limit covers it; a very short one, or
    /// none at all, leaves time for a store that works.
    fn open_within(&self) -> Option<Duration> {
        match (self.once, self.wait) {
            (Some(_), _) => None,
            (None, wait) => wait.map(|limit| limit.max(NO_WAIT_WITHIN)),
        }
    }
}

/// The guards of the keys.
enum Held {
    Locks(Guards),
    Turn(Box<OnceGuard>),
}

impl Held {
    fn guards(&self) -> &[Guard] {
        match self {
            Self::Locks(guards) => guards,
            Self::Turn(turn) => std::slice::from_ref::<Guard>(turn),
        }
    }
}

/// A handle of the thread. If the thread ends without a release, the store frees the key when the session ends.
#[derive(Debug)]
pub(crate) struct Hold {
    commands: UnboundedSender<Command>,
    cancel: CancellationToken,
}

enum Command {
    LostKey(Sender<Option<usize>>),
    Release { cooldown: Option<Duration>, succeeded: bool },
    AskAgain,
}

impl Hold {
    /// Starts the thread and requests the keys. The answer is an event.
    pub(crate) fn ask(plan: HoldPlan, events: Sender<Event>) -> Result<Self, Failure> {
        let (commands, inbox) = unbounded_channel();
        let cancel = CancellationToken::new();
        let hold = Self { commands, cancel: cancel.clone() };
        let refused = |error| Failure::new(exit_code::INTERNAL, format!("the system refused a thread: {error}"));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(refused)?;
        let live = move || {
            let farewell = events.clone();
            let whole = AssertUnwindSafe(|| runtime.block_on(live(&plan, cancel, inbox, events)));
            if std::panic::catch_unwind(whole).is_err() {
                say_farewell(&farewell);
            }
        };
        std::thread::Builder::new().name("hold".into()).spawn(live).map_err(refused)?;
        Ok(hold)
    }

    /// Stops waiting. The answer is an event here too.
    pub(crate) fn cancel(&self) {
        self.cancel.cancel();
    }

    /// Returns the place of a key that is not held now, by the clock; the first one if the thread does not answer.
    pub(crate) fn lost_key(&self) -> Option<usize> {
        let (answer, answered) = mpsc::channel();
        match self.commands.send(Command::LostKey(answer)) {
            Ok(()) => answered.recv_timeout(Duration::from_secs(1)).unwrap_or(Some(0)),
            Err(_) => Some(0),
        }
    }

    /// Requests the keys again, after a release. The answer is an event, as after the first request.
    pub(crate) fn ask_again(&self) -> Result<(), Failure> {
        self.commands.send(Command::AskAgain).map_err(|_| thread_has_ended())
    }

    /// Releases the key and keeps it closed for `cooldown`. The answer is an event.
    pub(crate) fn release(&self, cooldown: Option<Duration>, succeeded: bool) {
        // A thread that has ended has sent the reason.
        let _ = self.commands.send(Command::Release { cooldown, succeeded }); // the receiver may have ended
    }
}

/// Ends every wait of the main thread after a panic of this thread: the state of the key is unknown from here on.
fn say_farewell(events: &Sender<Event>) {
    for event in [
        Event::NotObtained(Refusal::Failed(thread_has_ended())),
        Event::Lost(Loss { key: 0, cause: LossCause::Closed, left: None }),
        Event::Released(Err(thread_has_ended())),
    ] {
        let _ = events.send(event); // the receiver may have ended
    }
}

fn thread_has_ended() -> Failure {
    Failure::new(exit_code::INTERNAL, "stanchion has a defect: the thread that holds the key has ended")
}

async fn live(
    plan: &HoldPlan,
    cancel: CancellationToken,
    mut inbox: UnboundedReceiver<Command>,
    events: Sender<Event>,
) {
    let tell = |event| {
        // The main thread has ended, and with it this process.
        let _ = events.send(event); // the receiver may have ended
    };
    let mut has_held = false;
    let mut reported = None;
    loop {
        match hold_once(plan, &cancel, &mut inbox, &tell).await {
            Ok(()) => (has_held, reported) = (true, None),
            // A candidate that has led before waits through an outage of any length.
            Err(Refusal::Failed(fault)) if has_held && fault.code == exit_code::UNAVAILABLE => {
                if reported.as_ref() != Some(&fault.message) {
                    let line = format!("{}; trying again until the store answers", fault.message);
                    tell(Event::Report(Report::Problem(line)));
                    reported = Some(fault.message);
                }
                tokio::select! {
                    () = cancel.cancelled() => {}
                    () = pause(ASK_AGAIN_AFTER) => {}
                }
                continue;
            }
            Err(refusal) => tell(Event::NotObtained(refusal)),
        }
        // Other commands are about the hold that has ended.
        loop {
            match inbox.recv().await {
                Some(Command::AskAgain) => break,
                Some(_) => {}
                None => return,
            }
        }
    }
}

/// Opens the store, obtains the keys, and keeps them until they are released.
async fn hold_once(
    plan: &HoldPlan,
    cancel: &CancellationToken,
    inbox: &mut UnboundedReceiver<Command>,
    tell: &impl Fn(Event),
) -> Result<(), Refusal> {
    let obtained = open_and_obtain(plan, cancel, tell, async |opened, happenings, started| match plan.once {
        Some(schedule) => begin(plan, schedule, cancel, opened).await,
        None => obtain(plan, started, cancel, opened, happenings, tell).await,
    });
    let (opened, mut happenings, held) = obtained.await?;
    // From here on a warning is about this hold.
    while event_that_is_there(&mut happenings).await.is_some() {}
    let holds = held.guards().iter().map(|guard| (guard.key().clone(), guard.fence())).collect();
    let mut report = HoldReport::new(holds, plan.loss_ends_command);
    let mut keys: Vec<_> =
        held.guards().iter().map(|guard| HeldKey { key: guard.key().clone(), fence: guard.fence().get() }).collect();
    keys.sort_by_key(|held| plan.place(&held.key));
    tell(Event::Obtained(Obtained { keys, descriptor: opened.session_descriptor() }));
    let released = keep(held, plan, inbox, &mut happenings, &mut report, tell).await;
    // A hold that could not be released ends with the session.
    let _ = opened.locks.close().await; // the session then expires by itself
    // The keeper has reported everything by now.
    while let Some(event) = event_that_is_there(&mut happenings).await {
        report.collect(event);
    }
    let released = released.map(|was_lost| Released { was_lost, explanation: report.explanation() });
    tell(Event::Released(released));
    Ok(())
}

/// Opens the store and locks the one key of the plan.
pub(crate) async fn obtain_one(
    plan: &HoldPlan,
    cancel: &CancellationToken,
    tell: &impl Fn(Event),
) -> Result<(Opened, Guard), Refusal> {
    let locked = open_and_obtain(plan, cancel, tell, async |opened, happenings, started| {
        let mut request = opened.locks.lock(plan.keys[0].name()).demand(plan.demand).cancel(cancel.clone());
        if let Some(lifetime) = plan.lifetime {
            request = request.ttl(lifetime);
        }
        if let Some(text) = &plan.metadata {
            request = request.metadata(text.as_str());
        }
        let attempt = async {
            match plan.left_to_wait(started) {
                Some(Duration::ZERO) => {
                    within(plan.left_to_answer(started), request.wait(Duration::ZERO).into_future()).await
                }
                Some(limit) => Some(request.wait(limit).await),
                None => Some(request.await),
            }
        };
        while_reporting(attempt, plan, opened, happenings, tell).await
    });
    locked.await.map(|(opened, _, guard)| (opened, guard))
}

/// Opens the store, and obtains the keys in it with `request`. Closes the store if they are not obtained.
async fn open_and_obtain<T>(
    plan: &HoldPlan,
    cancel: &CancellationToken,
    tell: &impl Fn(Event),
    request: impl AsyncFnOnce(&Opened, &mut EventStream, BootTime) -> Result<T, Refusal>,
) -> Result<(Opened, EventStream, T), Refusal> {
    let started = Clock::system().now();
    let opened = tokio::select! {
        biased;
        () = cancel.cancelled() => return Err(Refusal::Cancelled),
        opened = plan.store.open(Some(&plan.owner), plan.ttl, plan.open_within()) => opened.map_err(Refusal::Failed)?,
    };
    let mut happenings = opened.locks.events();
    for warning in opened.locks.warnings() {
        tell(Event::Report(Report::Progress(warning)));
    }
    match request(&opened, &mut happenings, started).await {
        Ok(obtained) => Ok((opened, happenings, obtained)),
        Err(refusal) => {
            let is_store_away = matches!(&refusal, Refusal::Failed(failure) if failure.code == exit_code::UNAVAILABLE);
            close(&opened, is_store_away).await;
            Err(refusal)
        }
    }
}

async fn obtain(
    plan: &HoldPlan,
    started: BootTime,
    cancel: &CancellationToken,
    opened: &Opened,
    happenings: &mut EventStream,
    tell: &impl Fn(Event),
) -> Result<Held, Refusal> {
    let (units, capacity) = (plan.demand.units(), plan.demand.capacity());
    let requests = plan.keys.iter().map(|key| KeyRequest::semaphore(key.name(), capacity, units));
    let mut request = opened.locks.lock_all(requests).cancel(cancel.clone());
    if let Some(longest) = plan.max_hold {
        request = request.max_hold(longest);
    }
    if let Some(text) = &plan.metadata {
        request = request.metadata(text.as_str());
    }
    let attempt = async {
        match plan.left_to_wait(started) {
            Some(Duration::ZERO) => {
                within(plan.left_to_answer(started), request.wait(Duration::ZERO).into_future()).await
            }
            Some(limit) => Some(request.wait(limit).await),
            None => Some(request.await),
        }
    };
    while_reporting(attempt, plan, opened, happenings, tell).await.map(Held::Locks)
}

/// Waits for the answer to a request, and reports meanwhile what happens to it. Without an answer the store was silent.
async fn while_reporting<T>(
    attempt: impl Future<Output = Option<stanchion::Result<T>>>,
    plan: &HoldPlan,
    opened: &Opened,
    happenings: &mut EventStream,
    tell: &impl Fn(Event),
) -> Result<T, Refusal> {
    let mut attempt = pin!(attempt);
    // The library locks several keys in this order, so the first one that is missing is the one that is waited for.
    let mut missing: Vec<&Key> = plan.keys.iter().collect();
    missing.sort_by_key(|key| key.as_encoded());
    let mut report =
        WaitReport::new(&opened.locks, missing[0].name(), Some(&plan.owner), plan.demand, plan.describe_wait_after);
    let answer = loop {
        tokio::select! {
            biased;
            answer = &mut attempt => break answer,
            Some(happening) = happenings.next() => match happening {
                stanchion::Event::Acquired { key, .. } => {
                    missing.retain(|other| **other != key);
                    missing.iter().take(1).for_each(|next| report.turn_to(next.name()));
                }
                stanchion::Event::Contended { key, .. } => tell(Event::Waiting(key)),
                stanchion::Event::LimitsDiffer { key, in_use, asked, .. } => {
                    let line = format!("key `{}`: {}", quoted_key(key.name()), limits_differ(in_use, asked));
                    tell(Event::Report(Report::Problem(line)));
                }
                stanchion::Event::Warning { message, .. } => tell(Event::Report(Report::Progress(message))),
                _ => {}
            },
            line = report.next() => tell(Event::Report(line)),
        }
    };
    let Some(answer) = answer else { return Err(Refusal::Failed(silent(NO_WAIT_WITHIN))) };
    match answer {
        Ok(held) => Ok(held),
        Err(error) if matches!(error.kind(), ErrorKind::Timeout | ErrorKind::Busy) => {
            while let Some(happening) = event_that_is_there(happenings).await {
                if let stanchion::Event::Acquired { key, .. } = happening {
                    missing.retain(|other| **other != key);
                }
            }
            let key = missing.first().copied().unwrap_or(&plan.keys[0]);
            Err(Refusal::Busy(busy(plan, key, opened).await))
        }
        Err(error) if error.kind() == ErrorKind::Cancelled => Err(Refusal::Cancelled),
        Err(error) => Err(Refusal::Failed(error.into())),
    }
}

/// Returns the guard of a scheduled command if it is to run now.
async fn begin(
    plan: &HoldPlan,
    schedule: Schedule,
    cancel: &CancellationToken,
    opened: &Opened,
) -> Result<Held, Refusal> {
    let key = &plan.keys[0];
    let mut request = opened.locks.once(key.name()).cancel(cancel.clone());
    if schedule.is_forced {
        request = request.force();
    }
    if let Some(period) = schedule.every {
        request = request.every(period);
    }
    if let Some(slot) = schedule.slot {
        request = request.slot(slot);
    }
    if let Some(longest) = plan.max_hold {
        request = request.max_hold(longest);
    }
    if let Some(text) = &plan.metadata {
        request = request.metadata(text.as_str());
    }
    match request.begin().await {
        Ok(OnceOutcome::Ran(turn)) => Ok(Held::Turn(Box::new(turn))),
        Ok(
            OnceOutcome::Skipped { last: Some(last), is_running: false, .. } | OnceOutcome::DoneElsewhere { last, .. },
        ) => {
            let again = last.closed_still_for().map(|left| format!(", and not again for another {}", for_people(left)));
            let (age, owner) = (for_people(last.age), escape(&last.owner));
            let again = again.unwrap_or_default();
            Err(Refusal::Busy(format!("key `{}` was done by {owner} {age} ago{again}", quoted_key(key.name()))))
        }
        Ok(_) => Err(Refusal::Busy(busy(plan, key, opened).await)),
        Err(error) if error.kind() == ErrorKind::Cancelled => Err(Refusal::Cancelled),
        Err(error) => Err(Refusal::Failed(error.into())),
    }
}

/// Keeps the keys until the main thread has them released. Returns whether one was lost.
async fn keep(
    held: Held,
    plan: &HoldPlan,
    inbox: &mut UnboundedReceiver<Command>,
    happenings: &mut EventStream,
    report: &mut HoldReport,
    tell: &impl Fn(Event),
) -> Result<bool, Failure> {
    let mut announced = Vec::new();
    let guards = held.guards();
    let (cooldown, succeeded) = loop {
        let command = tokio::select! {
            biased;
            (guard, cause) = next_loss(guards, &announced) => {
                announced.push(guard.key());
                tell(Event::Lost(Loss { key: plan.place(guard.key()), cause, left: guard.valid_for() }));
                continue;
            }
            command = inbox.recv() => command,
            Some(happening) = happenings.next() => {
                if let Some(line) = report.note(happening, guards) {
                    tell(Event::Report(line));
                }
                continue;
            }
            line = report.end_of_outage(guards) => {
                tell(Event::Report(line));
                continue;
            }
        };
        match command {
            Some(Command::LostKey(answer)) => {
                let lost = guards.iter().find(|guard| !guard.is_held());
                let _ = answer.send(lost.map(|guard| plan.place(guard.key()))); // the caller may have given up
            }
            Some(Command::Release { cooldown, succeeded }) => break (cooldown, succeeded),
            // Only after a release.
            Some(Command::AskAgain) => {}
            None => break (None, false),
        }
    };
    let released = match held {
        Held::Locks(guards) => {
            guards.iter().try_for_each(|guard| guard.set_cooldown(cooldown))?;
            guards.release().await
        }
        Held::Turn(turn) => turn.finish(succeeded).await,
    };
    match released {
        Ok(released) => Ok(released == stanchion::Released::AlreadyLost),
        Err(error) if matches!(error.kind(), ErrorKind::Lost(_)) => Ok(true),
        Err(error) => Err(error.into()),
    }
}

/// Waits for the loss of a key that is not among those announced; forever if there is none.
async fn next_loss<'a>(guards: &'a [Guard], announced: &[&Key]) -> (&'a Guard, LossCause) {
    let rest = guards.iter().filter(|guard| !announced.contains(&guard.key()));
    let mut losses: Vec<_> = rest.map(|guard| (guard, Box::pin(guard.lost()))).collect();
    poll_fn(|context| {
        for (guard, lost) in &mut losses {
            if let Poll::Ready(cause) = lost.as_mut().poll(context) {
                return Poll::Ready((*guard, cause));
            }
        }
        Poll::Pending
    })
    .await
}

/// Returns an event that has arrived already, without waiting.
async fn event_that_is_there(happenings: &mut EventStream) -> Option<stanchion::Event> {
    tokio::select! {
        biased;
        happening = happenings.next() => happening,
        () = std::future::ready(()) => None,
    }
}

/// Names the holder of the key, for the message of a key that was not obtained.
async fn busy(plan: &HoldPlan, key: &Key, opened: &Opened) -> String {
    let limit = match plan.wait {
        None | Some(Duration::ZERO) => String::new(),
        Some(limit) => format!(" within {}", for_people(limit)),
    };
    let why = match within(LOOK_WITHIN, opened.locks.inspect(key.name())).await {
        Some(Ok(state)) => describe(&state, plan.demand),
        Some(Err(_)) | None => "it is taken".to_owned(),
    };
    format!("key `{}` was not obtained{limit}: {why}", quoted_key(key.name()))
}
