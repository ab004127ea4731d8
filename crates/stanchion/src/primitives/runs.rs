//! The record of the last run of a key: what [`once`](crate::Locks::once) decides by, and people look at.
//!
//! A run is a hold with a fixed lifetime under a companion of the key, with what there is to say as its text. So it is kept by the
//! store's clock, in every store, and goes by itself. Whoever records a run has the lock, and ends the record before it.

use std::time::{Duration, SystemTime};

use crate::command::Cleanup;
use crate::error::{Error, ErrorKind, Result};
use crate::fence::Fence;
use crate::guard::Guard;
use crate::key::Key;
use crate::locks::{DURATION_RANGE, Locks};
use crate::store::{AcquireOutcome, AcquireRequest, Demand, Lifetime};
use crate::token::TokenId;

/// A record is kept at least so long.
const KEPT: Duration = Duration::from_secs(24 * 60 * 60);

/// How long its request may be on its way.
const WINDOW: Duration = Duration::from_secs(5);

/// The first word of a record. Another one is for another way to write it.
const VERSION: &str = "1";

/// What is known of a run.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct RunRecord {
    /// The slot of a schedule that it was for, if it was said.
    pub slot: Option<u64>,
    /// When it began, by the clock of the one who ran: for display.
    pub began: SystemTime,
    /// How long it took.
    pub took: Duration,
    /// How long ago it ended, by the store's clock.
    pub age: Duration,
    /// Whether the body returned without an error.
    pub succeeded: bool,
    /// For how long after its end it is not to be run again, unless it is for a later slot.
    pub closed_for: Duration,
    /// Who ran it: the label of its handle, by default with its host.
    pub owner: String,
    /// The fence that it ran under.
    pub fence: Fence,
    /// Whether it stands for its slot: it succeeded, or a failure was to count too.
    pub(crate) counts: bool,
}

impl RunRecord {
    /// How long it still keeps others from running.
    pub fn closed_still_for(&self) -> Option<Duration> {
        self.closed_for.checked_sub(self.age).filter(|left| !left.is_zero())
    }

    /// Whether a former run decides nothing any more beside this one. A run that does not count takes nothing away from those
    /// that do, nor does one for a lower slot, or for none, from the slot that was done.
    fn replaces(&self, former: &Self) -> bool {
        !former.counts || (self.counts && former.slot <= self.slot)
    }

    fn write(&self, token: TokenId) -> String {
        let slot = self.slot.map_or_else(|| "-".to_owned(), |slot| slot.to_string());
        let began = self.began.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_micros();
        let outcome = match (self.succeeded, self.counts) {
            (true, _) => "succeeded",
            (false, true) => "failed-and-counts",
            (false, false) => "failed",
        };
        let (took, closed_for) = (self.took.as_micros(), self.closed_for.as_micros());
        let (fence, token) = (self.fence.get(), token.to_hex());
        format!("{VERSION} {outcome} {slot} {began} {took} {closed_for} {fence} {token} {}", self.owner)
    }

    fn read(text: &str, age: Duration) -> Option<(Self, TokenId)> {
        let mut words = text.splitn(9, ' ');
        let mut next = || words.next();
        if next()? != VERSION {
            return None;
        }
        let (succeeded, counts) = match next()? {
            "succeeded" => (true, true),
            "failed-and-counts" => (false, true),
            "failed" => (false, false),
            _ => return None,
        };
        let slot = match next()? {
            "-" => None,
            slot => Some(slot.parse().ok()?),
        };
        let mut micros = || next()?.parse().ok().map(Duration::from_micros);
        let (began, took) = (SystemTime::UNIX_EPOCH.checked_add(micros()?)?, micros()?);
        // Another program wrote it, and nobody is to be kept out for longer than a call can ask for.
        let closed_for = micros()?.min(*DURATION_RANGE.end());
        let fence = Fence::new(next()?.parse().ok()?);
        let token = TokenId::from_hex(next()?)?;
        let owner = next()?.to_owned();
        Some((Self { slot, began, took, age, succeeded, closed_for, owner, fence, counts }, token))
    }
}

/// What was found of the runs of a key.
#[derive(Debug)]
pub(crate) struct Found {
    /// The last run.
    pub(crate) run: Option<RunRecord>,
    /// The last run that counts.
    pub(crate) done: Option<RunRecord>,
    /// Of those that count the one for the highest slot, if one was for a slot.
    pub(crate) slot_done: Option<RunRecord>,
    /// The records that are there: those of the runs above, and some that were not ended yet.
    records: Vec<(RunRecord, TokenId)>,
}

fn companion(key: &Key) -> Result<Key> {
    key.companion("runs")
}

/// The last run of a key.
pub(crate) async fn last_run(locks: &Locks, key: &Key) -> Result<Found> {
    let shared = &locks.handle.shared;
    let companion = companion(key)?;
    let reply = shared.step(|| shared.store.inspect(&companion)).await.result;
    let holders = reply.map_err(|error| error.with_key(key))?.outcome.holders;
    let mut records = Vec::new();
    for holder in holders {
        let text = holder.metadata.as_deref().unwrap_or_default();
        let Some((run, token)) = RunRecord::read(text, holder.age) else {
            let message = "the record of the last run was written by a newer version of stanchion: update this one";
            return Err(shared.error(ErrorKind::Misconfigured, message).with_key(key));
        };
        records.push((run, token));
    }
    let runs = || records.iter().map(|(run, _)| run);
    let counting = || runs().filter(|run| run.counts);
    // The last is so by the lock that it ran under: a record may arrive after that of a later run.
    let run = runs().max_by_key(|run| run.fence).cloned();
    let done = counting().max_by_key(|run| run.fence).cloned();
    let slot_done = counting().filter(|run| run.slot.is_some()).max_by_key(|run| run.slot).cloned();
    Ok(Found { run, done, slot_done, records })
}

/// Records a run, in place of those before it that say nothing beside it. Only with the guard of the key.
pub(crate) async fn record(locks: &Locks, guard: &Guard, run: &RunRecord, former: Found) -> Result<()> {
    let shared = &locks.handle.shared;
    let key = guard.key();
    let companion = companion(key)?;
    let keep = run.closed_for.max(KEPT).min(*DURATION_RANGE.end());
    let outcome = loop {
        let token = TokenId::random()?;
        let request = AcquireRequest {
            key: companion.clone(),
            token,
            session: shared.valid_session().await?.id,
            demand: Demand::READ,
            lifetime: Lifetime::Fixed(keep),
            enqueue: false,
            not_after: shared.store_time().after(WINDOW),
            metadata: Some(run.write(token)),
            trace: None,
        };
        let step = shared.step(|| shared.store.acquire(request.clone())).await;
        let outcome = step.result.map_err(|error| error.with_key(key))?.outcome;
        // The store was away for longer than the question may be on its way. It is there again, and nothing of that question
        // is or will be.
        if outcome != AcquireOutcome::Stale || !guard.is_held() {
            break outcome;
        }
    };
    if !matches!(outcome, AcquireOutcome::Granted(_)) {
        let message = format!("the run could not be recorded: {outcome:?}");
        return Err(Error::new(ErrorKind::Unavailable, message).with_key(key).with_store(shared.capabilities.name));
    }
    for (former, token) in former.records {
        if !run.replaces(&former) {
            continue;
        }
        shared.clean_up(Cleanup::of_token(companion.clone(), token));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_is_read_back_as_it_was_written() {
        let token = TokenId::random().unwrap();
        for (slot, succeeded, counts, owner) in
            [(None, true, true, "job@host/1"), (Some(0), false, true, ""), (Some(u64::MAX), false, false, " a  b ")]
        {
            let run = RunRecord {
                slot,
                began: SystemTime::UNIX_EPOCH + Duration::from_micros(1_763_000_000_123_456),
                took: Duration::from_micros(7),
                age: Duration::from_secs(3),
                succeeded,
                closed_for: Duration::from_secs(86_400),
                owner: owner.into(),
                fence: Fence::new(42),
                counts,
            };
            assert_eq!(RunRecord::read(&run.write(token), run.age), Some((run, token)));
        }
        let endless = format!("1 succeeded - 1 2 {} 4 {} x", u64::MAX, token.to_hex());
        let (run, _) = RunRecord::read(&endless, Duration::ZERO).unwrap();
        assert_eq!(run.closed_for, *DURATION_RANGE.end(), "nobody is kept out for longer than a call can ask for");
        for text in ["", "1", "2 succeeded - 1 2 3 4 00000000000000000000000000000000 x", "1 succeeded - 1 2 3 4 zz x"]
        {
            assert_eq!(RunRecord::read(text, Duration::ZERO), None, "{text:?}");
        }
    }
}
