//! Elects leaders: one of several candidates at a time.

use std::time::Duration;

use crate::error::{LossCause, Result};
use crate::fence::Fence;
use crate::guard::{Guard, Released};
use crate::lifecycle::Phase;
use crate::request::LockRequest;
use crate::retry::sleep_unless_recovered;
use crate::shared::Shared;
use crate::store::HolderState;

/// Interval at which an observer polls the store, because the store notifies waiters but not observers.
const POLL_INTERVAL: Duration = Duration::from_secs(1);

/// An election under a key, for candidates and observers. [`Locks::elect`](crate::Locks::elect) returns one.
///
/// - Candidates queue, first come, first served. When the leader resigns or its process ends, the store notifies the
///   next candidate with one message.
/// - A leader that cannot renew its session steps down before the next one can be elected: see [`Leadership::lost`].
/// - Each term has a number that is higher than those of all earlier terms. Send it with everything that the leader
///   does, so that a resource can reject a former leader.
///
/// ```
/// # tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(async {
/// # let locks = stanchion::Locks::open("memory:").await?;
/// let election = locks.elect("scheduler").metadata("worker-3");
/// let leadership = election.campaign().await?;
/// assert_eq!(election.leader().await?.map(|leader| leader.term), Some(leadership.term()));
/// leadership.resign().await?;
/// # Ok::<(), stanchion::Error>(()) }).unwrap();
/// ```
///
/// [`lead`](Election::lead) runs a body for each term, without a loop of your own.
#[derive(Clone, Debug)]
pub struct Election {
    request: LockRequest,
}

impl Election {
    pub(crate) fn new(request: LockRequest) -> Self {
        // The store alone says who leads.
        Self { request: request.linger(Duration::ZERO) }
    }

    /// Sets text about this candidate for observers, such as its address. At most 4 KiB.
    #[must_use]
    pub fn metadata(mut self, text: impl Into<String>) -> Self {
        self.request = self.request.metadata(text);
        self
    }

    /// Limits the length of a term. The leader then steps down, and may campaign again.
    #[must_use]
    pub fn max_term(mut self, longest: Duration) -> Self {
        self.request = self.request.max_hold(longest);
        self
    }

    /// Waits in the queue until this candidate is elected.
    ///
    /// # Errors
    /// The errors of an awaited [`LockRequest`].
    ///
    /// # Cancel safety
    /// A dropped future leaves the queue.
    pub async fn campaign(&self) -> Result<Leadership> {
        Ok(Leadership { guard: self.request.clone().await? })
    }

    /// Tries once to become the leader. Returns `None` if someone else leads or waits.
    ///
    /// # Errors
    /// The errors of [`LockRequest::try_acquire`].
    ///
    /// # Cancel safety
    /// A dropped future leaves nothing behind.
    pub async fn try_campaign(&self) -> Result<Option<Leadership>> {
        Ok(self.request.clone().try_acquire().await?.map(|guard| Leadership { guard }))
    }

    /// Campaigns again and again, and runs `body` for each term, until the body returns a value while it leads.
    ///
    /// If a term ends while the body runs, the body's future is dropped at its next await, and this candidate queues
    /// again.
    ///
    /// ```
    /// # tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(async {
    /// # let locks = stanchion::Locks::open("memory:").await?;
    /// # async fn schedule(_term: stanchion::Fence) {}
    /// locks.elect("scheduler").lead(async |leadership| schedule(leadership.term()).await).await?;
    /// # Ok::<(), stanchion::Error>(()) }).unwrap();
    /// ```
    ///
    /// Each term runs a clone of `body`. State that the terms share must be borrowed or in an `Arc`. In a spawned task:
    ///
    /// ```
    /// # use std::sync::Arc;
    /// # tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(async {
    /// # let locks = stanchion::Locks::open("memory:").await?;
    /// # async fn schedule(_jobs: &[&str], _term: stanchion::Fence) {}
    /// let jobs = Arc::new(vec!["backup"]);
    /// let leads = tokio::spawn(async move {
    ///     locks.elect("scheduler").lead(async |leadership| schedule(&jobs, leadership.term()).await).await
    /// });
    /// # leads.await.unwrap()?;
    /// # Ok::<(), stanchion::Error>(()) }).unwrap();
    /// ```
    ///
    /// # Errors
    /// The errors of [`Election::campaign`], except transient ones
    /// ([`Error::is_transient`](crate::Error::is_transient)): after those the candidate queues again, with the pauses
    /// of the [`RetryPolicy`](crate::RetryPolicy), for as long as the store is unavailable.
    /// [`ErrorKind::Draining`](crate::ErrorKind::Draining) ends the call.
    ///
    /// # Cancel safety
    /// A dropped future drops the body and resigns.
    pub async fn lead<T>(self, body: impl AsyncFnOnce(&Leadership) -> T + Clone) -> Result<T> {
        loop {
            let leadership = self.campaign_until_elected().await?;
            tokio::select! {
                biased;
                // A body that returns because its term ended must not count as done, so the loss is checked first.
                _ = leadership.lost() => {}
                value = body.clone()(&leadership) => {
                    let _ = leadership.resign().await; // an event reports the error, and the keeper keeps releasing
                    return Ok(value);
                }
            }
        }
    }

    /// Returns the current leader when the store was queried, or `None` if nobody leads.
    ///
    /// # Errors
    /// The errors of [`Locks::inspect`](crate::Locks::inspect).
    ///
    /// # Cancel safety
    /// Only reads.
    pub async fn leader(&self) -> Result<Option<Leader>> {
        let key = self.request.handle.key(&self.request.key)?;
        let state = self.shared().inspect(&key).await?;
        Ok(state.holders.into_iter().next().map(Leader::from))
    }

    /// Returns a stream of the leaders.
    pub fn observe(&self) -> LeaderStream {
        LeaderStream { election: self.clone(), last_term: None }
    }

    /// Campaigns, and retries after transient errors.
    async fn campaign_until_elected(&self) -> Result<Leadership> {
        let shared = self.shared();
        let mut pauses = shared.config.retry.endless_pauses();
        loop {
            let fault = match self.campaign().await {
                Err(fault) if fault.is_transient() => fault,
                ended => return ended,
            };
            let pause = pauses.next().unwrap_or_default().max(fault.retry_after().unwrap_or_default());
            tokio::select! {
                () = sleep_unless_recovered(&shared.clock, pause, &shared.store_recovered) => {}
                () = shared.draining() => return Err(shared.draining_error()),
            }
        }
    }

    fn shared(&self) -> &Shared {
        &self.request.handle.shared
    }
}

/// The leader of an election, as [`Election::leader`] returns it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Leader {
    /// The number of its term.
    pub term: Fence,
    /// The owner label of its handle.
    pub owner: String,
    /// The text that the candidate set with [`Election::metadata`].
    pub metadata: Option<String>,
    /// Time since it was elected, by the store's clock.
    pub leads_for: Duration,
}

impl From<HolderState> for Leader {
    fn from(holder: HolderState) -> Self {
        Self { term: holder.fence, owner: holder.owner, metadata: holder.metadata, leads_for: holder.age }
    }
}

/// The leaders of an election, one after the other. It polls the store once per second.
#[derive(Debug)]
pub struct LeaderStream {
    election: Election,
    last_term: Option<Option<Fence>>,
}

impl LeaderStream {
    /// Waits for another leader. The first call returns the current one.
    ///
    /// `None` means that nobody leads. Terms that began and ended between two polls are skipped.
    ///
    /// # Errors
    /// The errors of [`Election::leader`]. The stream can be used again after an error.
    ///
    /// # Cancel safety
    /// A dropped future misses nothing.
    pub async fn next(&mut self) -> Result<Option<Leader>> {
        loop {
            let leader = self.election.leader().await?;
            let term = leader.as_ref().map(|leader| leader.term);
            if self.last_term != Some(term) {
                self.last_term = Some(term);
                return Ok(leader);
            }
            let shared = self.election.shared();
            tokio::select! {
                () = shared.clock.sleep(POLL_INTERVAL) => {}
                () = shared.lifecycle.reached(Phase::Closed) => return Err(shared.draining_error()),
            }
        }
    }
}

/// A term as the leader. Dropping it resigns.
#[derive(Debug)]
#[must_use = "dropping a leadership resigns"]
pub struct Leadership {
    guard: Guard,
}

impl Leadership {
    /// Returns the number of the term, which is higher than those of all earlier terms. Send it with everything that
    /// the leader does.
    pub fn term(&self) -> Fence {
        self.guard.fence()
    }

    /// Returns whether this candidate leads, by its own clock. Does no I/O.
    pub fn is_leader(&self) -> bool {
        self.guard.is_held()
    }

    /// Returns an error if the term is over. Does no I/O.
    ///
    /// # Errors
    /// [`ErrorKind::Lost`](crate::ErrorKind::Lost).
    pub fn check(&self) -> Result<()> {
        self.guard.check()
    }

    /// Waits until the term is lost, early enough to stop before another leader is elected.
    ///
    /// # Cancel safety
    /// The same as for [`Guard::lost`].
    pub async fn lost(&self) -> LossCause {
        self.guard.lost().await
    }

    /// Returns the guard of the election's key, for heartbeats, cancellation tokens and deadlines.
    pub fn guard(&self) -> &Guard {
        &self.guard
    }

    /// Steps down. The same operation elects the next candidate in the queue and notifies it.
    ///
    /// # Errors
    /// The errors of [`Guard::release`].
    ///
    /// # Cancel safety
    /// The same as for [`Guard::release`].
    pub async fn resign(self) -> Result<Released> {
        self.guard.release().await
    }
}
