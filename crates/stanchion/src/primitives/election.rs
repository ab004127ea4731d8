//! Leaders: one of several candidates at a time.

use std::time::Duration;

use crate::error::{LossCause, Result};
use crate::fence::Fence;
use crate::guard::{Guard, Released};
use crate::request::LockRequest;
use crate::retry::sleep_unless_recovered;
use crate::shared::Shared;
use crate::store::HolderState;

/// How often one who observes asks: the store calls those who wait for a key, not those who only look.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// An election: who leads under a key, and how to become it. Made by [`Locks::elect`](crate::Locks::elect).
///
/// Candidates stand in line, first come first served. When the leader resigns, ends or dies, the next one is called: by one
/// message, not by asking around. A leader that cannot renew its session steps down before the next one can be elected:
/// [`Leadership::lost`]. Each term has a number that is higher than those before it: send it with what the leader does.
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
#[derive(Clone, Debug)]
pub struct Election {
    request: LockRequest,
}

impl Election {
    pub(crate) fn new(request: LockRequest) -> Self {
        Self { request }
    }

    /// Text of this candidate, for those who observe: at most 4 KiB. An address, for example.
    #[must_use]
    pub fn metadata(mut self, text: impl Into<String>) -> Self {
        self.request = self.request.metadata(text);
        self
    }

    /// The longest term: then the leader steps down, and stands in line again if it wants.
    #[must_use]
    pub fn max_term(mut self, longest: Duration) -> Self {
        self.request = self.request.max_hold(longest);
        self
    }

    /// Stands in line until it is elected.
    ///
    /// # Errors
    /// As [`LockRequest`] when awaited.
    ///
    /// # Cancel safety
    /// A dropped future leaves the line.
    pub async fn campaign(&self) -> Result<Leadership> {
        Ok(Leadership { guard: self.request.clone().await? })
    }

    /// Leads if nobody else does or stands in line; does not wait.
    ///
    /// # Errors
    /// As [`LockRequest::try_acquire`].
    ///
    /// # Cancel safety
    /// A dropped future leaves nothing behind.
    pub async fn try_campaign(&self) -> Result<Option<Leadership>> {
        Ok(self.request.clone().try_acquire().await?.map(|guard| Leadership { guard }))
    }

    /// Leads again and again: runs `body` for each term, until it returns a value while it leads. When a term ends under it, its
    /// future is dropped at its next await, and this stands in line again.
    ///
    /// ```
    /// # tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(async {
    /// # let locks = stanchion::Locks::open("memory:").await?;
    /// # async fn schedule(_term: stanchion::Fence) {}
    /// locks.elect("scheduler").lead(async |leadership| schedule(leadership.term()).await).await?;
    /// # Ok::<(), stanchion::Error>(()) }).unwrap();
    /// ```
    ///
    /// Each term runs a clone of `body`: what it shares with other terms it borrows, or has in an `Arc`. In a spawned task:
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
    /// As [`Election::campaign`], but for faults that pass ([`Error::is_transient`](crate::Error::is_transient)): after those it stands in line again, with
    /// the pauses of the [`RetryPolicy`](crate::RetryPolicy), for as long as the store is away.
    /// [`ErrorKind::Draining`](crate::ErrorKind::Draining) ends it.
    ///
    /// # Cancel safety
    /// A dropped future drops the body and resigns.
    pub async fn lead<T>(self, body: impl AsyncFnOnce(&Leadership) -> T + Clone) -> Result<T> {
        loop {
            let leadership = self.campaign_until_elected().await?;
            tokio::select! {
                biased;
                // First, so that a body that returns because the term has ended does not count as done.
                _ = leadership.lost() => {}
                value = body.clone()(&leadership) => {
                    // A resignation that failed is told by an event, and the keeper goes on with it.
                    let _resigned = leadership.resign().await;
                    return Ok(value);
                }
            }
        }
    }

    /// Who leads, as it was a moment ago. `None`: nobody.
    ///
    /// # Errors
    /// As [`Locks::inspect`](crate::Locks::inspect).
    ///
    /// # Cancel safety
    /// Reads only.
    pub async fn leader(&self) -> Result<Option<Leader>> {
        let state = self.request.locks.inspect(self.request.key.as_str()).await?;
        Ok(state.holders.into_iter().next().map(Leader::from))
    }

    /// Observes who leads.
    pub fn observe(&self) -> LeaderStream {
        LeaderStream { election: self.clone(), told: None }
    }

    /// Campaigns again after every fault that passes.
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
                () = shared.draining().cancelled() => return Err(shared.draining_error()),
            }
        }
    }

    fn shared(&self) -> &Shared {
        &self.request.locks.handle.shared
    }
}

/// Who leads.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Leader {
    /// The number of its term.
    pub term: Fence,
    /// Who it is: the label of its handle.
    pub owner: String,
    /// What it says of itself.
    pub metadata: Option<String>,
    /// How long it has led.
    pub leads_for: Duration,
}

impl From<HolderState> for Leader {
    fn from(holder: HolderState) -> Self {
        Self { term: holder.fence, owner: holder.owner, metadata: holder.metadata, leads_for: holder.age }
    }
}

/// The leaders of an election, one after the other. It asks once a second.
#[derive(Debug)]
pub struct LeaderStream {
    election: Election,
    told: Option<Option<Fence>>,
}

impl LeaderStream {
    /// The leader, at first as it is now and then whenever it is another one. `None`: nobody leads. Terms that began and
    /// ended between two looks are not told.
    ///
    /// # Errors
    /// As [`Election::leader`]. It can be asked again afterwards.
    ///
    /// # Cancel safety
    /// A dropped future loses nothing.
    pub async fn next(&mut self) -> Result<Option<Leader>> {
        loop {
            let leader = self.election.leader().await?;
            let term = leader.as_ref().map(|leader| leader.term);
            if self.told != Some(term) {
                self.told = Some(term);
                return Ok(leader);
            }
            let shared = self.election.shared();
            tokio::select! {
                () = shared.clock.sleep(LOOK_EVERY) => {}
                () = shared.closed.cancelled() => return Err(shared.draining_error()),
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
    /// The number of the term, higher than all before it: send it with what the leader does.
    pub fn term(&self) -> Fence {
        self.guard.fence()
    }

    /// Whether this is still believed to lead. Local.
    pub fn is_leader(&self) -> bool {
        self.guard.is_held()
    }

    /// An error if this does not lead any more. Local.
    ///
    /// # Errors
    /// [`ErrorKind::Lost`](crate::ErrorKind::Lost).
    pub fn check(&self) -> Result<()> {
        self.guard.check()
    }

    /// Waits until the term ends under the leader, early enough to stop before another one is elected.
    ///
    /// # Cancel safety
    /// As [`Guard::lost`].
    pub async fn lost(&self) -> LossCause {
        self.guard.lost().await
    }

    /// The guard of the key that stands for the office: heartbeats, tokens for cancellation, deadlines.
    pub fn guard(&self) -> &Guard {
        &self.guard
    }

    /// Steps down; the next in line is called by the same step.
    ///
    /// # Errors
    /// As [`Guard::release`].
    ///
    /// # Cancel safety
    /// As [`Guard::release`].
    pub async fn resign(self) -> Result<Released> {
        self.guard.release().await
    }
}
