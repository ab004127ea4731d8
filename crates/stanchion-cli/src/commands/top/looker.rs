//! Looks at the store from a thread of its own, so that a store that does not answer does not stop the view.

use std::sync::mpsc::{self, Receiver, Sender, TryRecvError};
use std::thread::JoinHandle;
use std::time::Duration;

use stanchion::store::{ForceReleaseOutcome, Listing};
use stanchion::{Clock, Fence, Locks};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use crate::exit_code;
use crate::message::{Failure, one_line, quoted_key};
use crate::store::{StoreChoice, close, pause, silent, within};

/// Interval between two looks.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Time after which a look is given up, and the store reported as away.
const LOOK_WITHIN: Duration = Duration::from_secs(5);

/// A hold to end by force.
#[derive(Debug)]
pub(super) struct Order {
    pub(super) key: String,
    pub(super) fence: Fence,
    pub(super) reason: String,
}

/// News for the view.
#[derive(Debug)]
pub(super) enum Message {
    Looked(Listing),
    /// The store cannot be queried, for this reason.
    Away(String),
    /// An order was carried out, or not: a text for people.
    Ordered(String),
}

/// A handle of the thread.
#[derive(Debug)]
pub(super) struct Looker {
    messages: Receiver<Message>,
    orders: UnboundedSender<Order>,
    thread: JoinHandle<()>,
}

impl Looker {
    /// Opens the store, and looks at the keys with this prefix from then on.
    pub(super) fn start(store: StoreChoice, prefix: String) -> Result<Self, Failure> {
        let (sender, messages) = mpsc::channel();
        let (orders, inbox) = unbounded_channel();
        let (opening, opened) = mpsc::channel();
        let refused = |error| Failure::new(exit_code::INTERNAL, format!("the system refused a thread: {error}"));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(refused)?;
        let run = move || {
            runtime.block_on(look(&store, &prefix, &opening, inbox, &sender));
            runtime.shutdown_background();
        };
        let thread = std::thread::Builder::new().name("looker".into()).spawn(run).map_err(refused)?;
        opened.recv().map_err(|_| ended())??;
        Ok(Self { messages, orders, thread })
    }

    /// Returns the messages that have arrived.
    pub(super) fn messages(&self) -> Result<Vec<Message>, Failure> {
        let mut arrived = Vec::new();
        loop {
            match self.messages.try_recv() {
                Ok(message) => arrived.push(message),
                Err(TryRecvError::Empty) => return Ok(arrived),
                Err(TryRecvError::Disconnected) => return Err(ended()),
            }
        }
    }

    pub(super) fn force_release(&self, order: Order) {
        let _ = self.orders.send(order); // if the thread has ended, the next message says so
    }

    /// Ends the session.
    pub(super) fn stop(self) {
        drop(self.orders);
        let _ = self.thread.join(); // a panic of it was printed
    }
}

fn ended() -> Failure {
    Failure::new(exit_code::INTERNAL, "stanchion has a defect: the thread that queries the store has ended")
}

async fn look(
    store: &StoreChoice,
    prefix: &str,
    opening: &Sender<Result<(), Failure>>,
    inbox: UnboundedReceiver<Order>,
    messages: &Sender<Message>,
) {
    // If the view has gone, nobody needs an answer.
    let opened = match store.open(None, None, None).await {
        Ok(opened) => opened,
        Err(failure) => return drop(opening.send(Err(failure))),
    };
    let _ = opening.send(Ok(())); // as above
    let mut is_away = false;
    tokio::select! {
        () = look_again_and_again(&opened.locks, prefix, messages, &mut is_away) => {}
        () = carry_out(&opened.locks, inbox, messages) => {}
    }
    close(&opened, is_away).await;
}

/// Looks at the keys until the view has gone.
async fn look_again_and_again(locks: &Locks, prefix: &str, messages: &Sender<Message>, is_away: &mut bool) {
    let clock = Clock::system();
    loop {
        let next = clock.now().after(LOOK_EVERY);
        let message = match within(LOOK_WITHIN, locks.list(prefix)).await {
            Some(Ok(listing)) => Message::Looked(listing),
            Some(Err(error)) => Message::Away(one_line(&Failure::from(error).message)),
            None => Message::Away(silent(LOOK_WITHIN).message),
        };
        *is_away = matches!(message, Message::Away(_));
        if messages.send(message).is_err() {
            return;
        }
        pause(next.since(clock.now())).await;
    }
}

/// Carries out orders until the view has gone.
async fn carry_out(locks: &Locks, mut inbox: UnboundedReceiver<Order>, messages: &Sender<Message>) {
    while let Some(Order { key, fence, reason }) = inbox.recv().await {
        let shown = quoted_key(&key);
        let text = match locks.force_release(key, fence, reason).await {
            Ok(ForceReleaseOutcome::Released) => format!("the hold of key `{shown}` was ended"),
            Ok(ForceReleaseOutcome::NoSuchHold { .. }) => {
                format!("the hold of key `{shown}` had ended already: nothing was changed")
            }
            Err(error) => {
                format!("the hold of key `{shown}` was not ended: {}", one_line(&Failure::from(error).message))
            }
        };
        let _ = messages.send(Message::Ordered(text)); // the view has gone
    }
}
