//! Runs the thread that obtains the key, notices its loss, and releases it. It sends [`Event`]s and takes commands.

use std::panic::AssertUnwindSafe;
use std::pin::pin;
use std::sync::mpsc::{self, Sender};
use std::time::Duration;

use stanchion::store::Demand;
use stanchion::{BootTime, Clock, ErrorKind, EventStream, Guard, LossCause, OnceGuard, OnceOutcome};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio_util::sync::CancellationToken;

use crate::child::{Event, Loss, Obtained, Refusal, Released};
use crate::exit_code;
use crate::message::{Failure, quoted_key};
use crate::output::{escape, for_people, limits_differ};
use crate::report::{HoldReport, Report, WaitReport, describe};
use crate::store::{Opened, StoreChoice, close, silent, within};

/// Maximum time for contact with the store where the key is not waited for, opening included.
const NO_WAIT_WITHIN: Duration = Duration::from_millis(900);

/// Maximum time for finding out who has the key, once it was not obtained.
const LOOK_WITHIN: Duration = Duration::from_millis(200);

/// A key to hold, with its options.
#[derive(Debug)]
pub(crate) struct HoldPlan {
    pub(crate) store: StoreChoice,
    pub(crate) key: String,
    pub(crate) demand: Demand,
    /// Maximum wait: `None` for no limit, zero for one attempt.
    pub(crate) wait: Option<Duration>,
    pub(crate) ttl: Option<Duration>,
    /// Fixed lifetime of the hold, which does not depend on this process.
    pub(crate) lifetime: Option<Duration>,
    pub(crate) max_hold: Option<Duration>,
    pub(crate) metadata: Option<String>,
    /// The schedule of `once`.
    pub(crate) once: Option<Schedule>,
    /// Label of this process that others see with the hold.
    pub(crate) owner: String,
    /// Time after which the wait is described, or `None` if nobody reads that.
    pub(crate) describe_wait_after: Option<Duration>,
}

/// The schedule of `once`: at least one of the two is there.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Schedule {
    pub(crate) every: Option<Duration>,
    pub(crate) slot: Option<u64>,
}

impl HoldPlan {
    /// How long opening the store may take: `None` for the library's default. A wait limit covers it; a very short one, or
    /// none at all, leaves time for a store that works.
    fn open_within(&self) -> Option<Duration> {
        match (self.once, self.wait) {
            (Some(_), _) => None,
            (None, wait) => wait.map(|limit| limit.max(NO_WAIT_WITHIN)),
        }
    }
}

/// The guard of the key.
enum Held {
    Lock(Guard),
    Turn(Box<OnceGuard>),
}

impl Held {
    fn guard(&self) -> &Guard {
        match self {
            Self::Lock(guard) => guard,
            Self::Turn(turn) => turn,
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
    IsHeld(Sender<bool>),
    Release { cooldown: Option<Duration>, succeeded: bool },
}

impl Hold {
    /// Starts the thread and requests the key. The answer is an event.
    pub(crate) fn ask(plan: HoldPlan, events: Sender<Event>) -> Result<Self, Failure> {
        let (commands, inbox) = unbounded_channel();
        let cancel = CancellationToken::new();
        let hold = Self { commands, cancel: cancel.clone() };
        let refused = |error| Failure::new(exit_code::INTERNAL, format!("the system refused a thread: {error}"));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(refused)?;
        let live = move || {
            let farewell = events.clone();
            let whole = AssertUnwindSafe(|| runtime.block_on(live(plan, cancel, inbox, events)));
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

    /// Returns whether the key is held now, by the clock; `false` if the thread does not answer.
    pub(crate) fn is_held(&self) -> bool {
        let (answer, answered) = mpsc::channel();
        let asked = self.commands.send(Command::IsHeld(answer));
        asked.is_ok() && answered.recv_timeout(Duration::from_secs(1)).unwrap_or(false)
    }

    /// Releases the key and keeps it closed for `cooldown`. The answer is an event.
    pub(crate) fn release(&self, cooldown: Option<Duration>, succeeded: bool) {
        // A thread that has ended has sent the reason.
        let _ = self.commands.send(Command::Release { cooldown, succeeded }); // the receiver may have ended
    }
}

/// Ends every wait of the main thread after a panic of this thread: the state of the key is unknown from here on.
fn say_farewell(events: &Sender<Event>) {
    let failure =
        || Failure::new(exit_code::INTERNAL, "stanchion has a defect: the thread that holds the key has ended");
    for event in [
        Event::NotObtained(Refusal::Failed(failure())),
        Event::Lost(Loss { cause: LossCause::Closed, left: None }),
        Event::Released(Err(failure())),
    ] {
        let _ = events.send(event); // the receiver may have ended
    }
}

async fn live(plan: HoldPlan, cancel: CancellationToken, mut inbox: UnboundedReceiver<Command>, events: Sender<Event>) {
    let tell = |event| {
        // The main thread has ended, and with it this process.
        let _ = events.send(event); // the receiver may have ended
    };
    let obtained = open_and_obtain(&plan, &cancel, &tell, async |opened, happenings, started| match plan.once {
        Some(schedule) => Ok(Held::Turn(Box::new(begin(&plan, schedule, &cancel, opened).await?))),
        None => lock(&plan, started, &cancel, opened, happenings, &tell).await.map(Held::Lock),
    });
    match obtained.await {
        Ok((opened, mut happenings, held)) => {
            // From here on a warning is about this hold.
            while event_that_is_there(&mut happenings).await.is_some() {}
            let mut report = HoldReport::new(held.guard().fence());
            tell(Event::Obtained(Obtained {
                key: held.guard().key().name().to_owned(),
                fence: held.guard().fence().get(),
                descriptor: opened.session_descriptor(),
            }));
            let released = keep(held, &mut inbox, &mut happenings, &mut report, &tell).await;
            // A hold that could not be released ends with the session.
            let _ = opened.locks.close().await; // the session then expires by itself
            // The keeper has reported everything by now.
            while let Some(event) = event_that_is_there(&mut happenings).await {
                report.collect(event);
            }
            let released = released.map(|was_lost| Released { was_lost, explanation: report.explanation() });
            tell(Event::Released(released));
        }
        Err(refusal) => tell(Event::NotObtained(refusal)),
    }
}

/// Opens the store and locks the key.
pub(crate) async fn obtain(
    plan: &HoldPlan,
    cancel: &CancellationToken,
    tell: &impl Fn(Event),
) -> Result<(Opened, Guard), Refusal> {
    let locked = open_and_obtain(plan, cancel, tell, async |opened, happenings, started| {
        lock(plan, started, cancel, opened, happenings, tell).await
    });
    locked.await.map(|(opened, _, guard)| (opened, guard))
}

/// Opens the store, and obtains the key in it with `request`. Closes the store if the key is not obtained.
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

async fn lock(
    plan: &HoldPlan,
    started: BootTime,
    cancel: &CancellationToken,
    opened: &Opened,
    happenings: &mut EventStream,
    tell: &impl Fn(Event),
) -> Result<Guard, Refusal> {
    let mut request = opened.locks.lock(plan.key.as_str()).demand(plan.demand).cancel(cancel.clone());
    if let Some(lifetime) = plan.lifetime {
        request = request.ttl(lifetime);
    }
    if let Some(longest) = plan.max_hold {
        request = request.max_hold(longest);
    }
    if let Some(text) = &plan.metadata {
        request = request.metadata(text.as_str());
    }
    let passed = Clock::system().now().since(started);
    let left = |limit: Duration| limit.saturating_sub(passed);
    let attempt = async {
        match plan.wait.map(left) {
            Some(Duration::ZERO) => within(left(NO_WAIT_WITHIN), request.try_acquire()).await,
            Some(limit) => Some(request.wait(limit).await.map(Some)),
            None => Some(request.await.map(Some)),
        }
    };
    let mut attempt = pin!(attempt);
    let mut report = WaitReport::new(&opened.locks, &plan.key, &plan.owner, plan.demand, plan.describe_wait_after);
    let answer = loop {
        tokio::select! {
            biased;
            answer = &mut attempt => break answer,
            Some(happening) = happenings.next() => match happening {
                stanchion::Event::Contended { .. } => tell(Event::Waiting),
                stanchion::Event::LimitsDiffer { in_use, asked, .. } => {
                    tell(Event::Report(Report::Problem(limits_differ(in_use, asked))));
                }
                stanchion::Event::Warning { message, .. } => tell(Event::Report(Report::Progress(message))),
                _ => {}
            },
            line = report.next() => tell(Event::Report(line)),
        }
    };
    let Some(answer) = answer else { return Err(Refusal::Failed(silent(NO_WAIT_WITHIN))) };
    match answer {
        Ok(Some(guard)) => Ok(guard),
        Ok(None) => Err(Refusal::Busy(busy(plan, opened).await)),
        Err(error) if matches!(error.kind(), ErrorKind::Timeout | ErrorKind::Busy) => {
            Err(Refusal::Busy(busy(plan, opened).await))
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
) -> Result<OnceGuard, Refusal> {
    let mut request = opened.locks.once(plan.key.as_str()).cancel(cancel.clone());
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
        Ok(OnceOutcome::Ran(turn)) => Ok(turn),
        Ok(
            OnceOutcome::Skipped { last: Some(last), is_running: false, .. } | OnceOutcome::DoneElsewhere { last, .. },
        ) => {
            let again = last.closed_still_for().map(|left| format!(", and not again for another {}", for_people(left)));
            let (age, owner) = (for_people(last.age), escape(&last.owner));
            let again = again.unwrap_or_default();
            Err(Refusal::Busy(format!("key `{}` was done by {owner} {age} ago{again}", quoted_key(&plan.key))))
        }
        Ok(_) => Err(Refusal::Busy(busy(plan, opened).await)),
        Err(error) if error.kind() == ErrorKind::Cancelled => Err(Refusal::Cancelled),
        Err(error) => Err(Refusal::Failed(error.into())),
    }
}

/// Keeps the key until the main thread has it released. Returns whether it was lost.
async fn keep(
    held: Held,
    inbox: &mut UnboundedReceiver<Command>,
    happenings: &mut EventStream,
    report: &mut HoldReport,
    tell: &impl Fn(Event),
) -> Result<bool, Failure> {
    let mut announced = false;
    let guard = held.guard();
    let (cooldown, succeeded) = loop {
        let command = tokio::select! {
            biased;
            cause = guard.lost(), if !announced => {
                announced = true;
                tell(Event::Lost(Loss { cause, left: guard.valid_for() }));
                continue;
            }
            command = inbox.recv() => command,
            Some(happening) = happenings.next() => {
                if let Some(line) = report.note(happening, guard) {
                    tell(Event::Report(line));
                }
                continue;
            }
            line = report.end_of_outage(guard) => {
                tell(Event::Report(line));
                continue;
            }
        };
        match command {
            Some(Command::IsHeld(answer)) => {
                // The main thread may have stopped waiting.
                let _ = answer.send(guard.is_held()); // the caller may have given up
            }
            Some(Command::Release { cooldown, succeeded }) => break (cooldown, succeeded),
            None => break (None, false),
        }
    };
    let released = match held {
        Held::Lock(guard) => {
            guard.set_cooldown(cooldown)?;
            guard.release().await
        }
        Held::Turn(turn) => turn.finish(succeeded).await,
    };
    match released {
        Ok(released) => Ok(released == stanchion::Released::AlreadyLost),
        Err(error) if matches!(error.kind(), ErrorKind::Lost(_)) => Ok(true),
        Err(error) => Err(error.into()),
    }
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
async fn busy(plan: &HoldPlan, opened: &Opened) -> String {
    let limit = match plan.wait {
        None | Some(Duration::ZERO) => String::new(),
        Some(limit) => format!(" within {}", for_people(limit)),
    };
    let why = match within(LOOK_WITHIN, opened.locks.inspect(plan.key.as_str())).await {
        Some(Ok(state)) => describe(&state, plan.demand),
        Some(Err(_)) | None => "it is taken".to_owned(),
    };
    format!("key `{}` was not obtained{limit}: {why}", quoted_key(&plan.key))
}
