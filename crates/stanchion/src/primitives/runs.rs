//! Records the last run of a key, by which [`once`](crate::Locks::once) decides whether to run again.
//!
//! A record is a hold with a fixed lifetime under a companion of the key, and its text is the hold's metadata.
//! Therefore every store can keep it, by its own clock, and it expires by itself. A caller records a run while it holds
//! the key, before it releases the key.

use std::time::{Duration, SystemTime};

use crate::command::Cleanup;
use crate::error::{Error, ErrorKind, Result};
use crate::fence::Fence;
use crate::guard::Guard;
use crate::key::{Key, companion_namespace, namespace_prefix, normal};
use crate::limits::DURATION_RANGE;
use crate::shared::Shared;
use crate::store::{AcquireOutcome, AcquireRequest, DamagedEntry, Demand, HolderState, Lifetime, Listing};
use crate::token::TokenId;

/// Minimum time for which a record is kept.
const MIN_RETENTION: Duration = Duration::from_secs(24 * 60 * 60);

/// Time after which the request that writes a record is too late.
const REQUEST_WINDOW: Duration = Duration::from_secs(5);

/// Name of the companion that has the records.
const COMPANION: &str = "runs";

/// First word of a record. Another format has another word.
const VERSION: &str = "1";

/// The record of one run of [`once`](crate::Locks::once).
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct RunRecord {
    /// The slot of a schedule for which it ran, if the request named one.
    pub slot: Option<u64>,
    /// Start of the run, by the clock of the machine that ran it. For display only.
    pub began: SystemTime,
    /// Duration of the run.
    pub took: Duration,
    /// Time since the end of the run, by the store's clock.
    pub age: Duration,
    /// Whether the body returned without an error.
    pub succeeded: bool,
    /// Time after the end of the run in which nobody runs it again, except for a later slot.
    pub closed_for: Duration,
    /// The owner label of the handle that ran it.
    pub owner: String,
    /// The fence of the run's lock.
    pub fence: Fence,
    /// Whether the run counts for its slot: it succeeded, or the request also counts failures.
    pub(crate) counts: bool,
}

impl RunRecord {
    /// Returns for how much longer this run keeps others from running, or `None` if it does not.
    pub fn closed_still_for(&self) -> Option<Duration> {
        self.closed_for.checked_sub(self.age).filter(|left| !left.is_zero())
    }

    /// Returns whether this run makes the record of a former run useless.
    ///
    /// A former run that counts stays useful if this run does not count, or is for a lower slot or for none.
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
        // Another program wrote the record. It must not close the key for longer than a call can request.
        let closed_for = micros()?.min(*DURATION_RANGE.end());
        let fence = Fence::new(next()?.parse().ok()?);
        let token = TokenId::from_hex(next()?)?;
        let owner = next()?.to_owned();
        Some((Self { slot, began, took, age, succeeded, closed_for, owner, fence, counts }, token))
    }
}

/// The last runs of [`once`](crate::Locks::once) that a store has records of.
/// [`Locks::list_runs`](crate::Locks::list_runs) returns it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct RunListing {
    /// The last run of each key, in the order of the keys.
    pub runs: Vec<(Key, RunRecord)>,
    /// Records that this program cannot read: they are damaged, or a newer version of stanchion wrote them.
    pub damaged: Vec<DamagedEntry>,
}

/// The records of a key's runs that the store has.
#[derive(Debug)]
pub(crate) struct RunHistory {
    /// The last run.
    pub(crate) run: Option<RunRecord>,
    /// The last run that counts.
    pub(crate) done: Option<RunRecord>,
    /// Among the runs that count, the one for the highest slot.
    pub(crate) slot_done: Option<RunRecord>,
    /// All records and their tokens. Some may belong to older runs whose records were not released yet.
    records: Vec<(RunRecord, TokenId)>,
}

fn companion(key: &Key) -> Result<Key> {
    key.companion(COMPANION)
}

/// The message for a record in a format of the future.
const NEWER: &str = "a newer version of stanchion wrote the record of the last run: update this version";

/// Returns the records among the holders of a companion, or `None` if one of them cannot be read.
fn records(holders: &[HolderState]) -> Option<Vec<(RunRecord, TokenId)>> {
    let read = |holder: &HolderState| RunRecord::read(holder.metadata.as_deref().unwrap_or_default(), holder.age);
    holders.iter().map(read).collect()
}

/// Returns the last run. The fence decides which one that is, because a record may arrive after the record of a later run.
fn last<'a>(runs: impl Iterator<Item = &'a RunRecord>) -> Option<&'a RunRecord> {
    runs.max_by_key(|run| run.fence)
}

/// Reads the records of a key's runs.
pub(crate) async fn last_run(shared: &Shared, key: &Key) -> Result<RunHistory> {
    let companion = companion(key)?;
    let reply = shared.step(|| shared.store.inspect(&companion)).await.result;
    let holders = reply.map_err(|error| error.with_key(key))?.outcome.holders;
    let Some(records) = records(&holders) else {
        return Err(shared.error(ErrorKind::Misconfigured, NEWER).with_key(key));
    };
    let runs = || records.iter().map(|(run, _)| run);
    let counting = || runs().filter(|run| run.counts);
    let (run, done) = (last(runs()).cloned(), last(counting()).cloned());
    let slot_done = counting().filter(|run| run.slot.is_some()).max_by_key(|run| run.slot).cloned();
    Ok(RunHistory { run, done, slot_done, records })
}

/// Reads the last run of each key that begins with `prefix`.
pub(crate) async fn list_runs(shared: &Shared, prefix: &str) -> Result<RunListing> {
    let namespace = &shared.config.namespace;
    let prefix = namespace_prefix(&companion_namespace(namespace, COMPANION)) + &normal(prefix);
    let Listing { keys, damaged, .. } = shared.list(&prefix).await?;
    let mut listing = RunListing { runs: Vec::new(), damaged };
    for state in keys {
        match records(&state.holders) {
            Some(records) => {
                let run = last(records.iter().map(|(run, _)| run));
                let key = Key::new(namespace, state.key.name())?;
                listing.runs.extend(run.map(|run| (key, run.clone())));
            }
            None => listing.damaged.push(DamagedEntry::new(state.key.as_encoded(), NEWER)),
        }
    }
    Ok(listing)
}

/// Releases the records of a key's runs, and returns whether there was one.
pub(crate) async fn forget_run(shared: &Shared, key: &Key) -> Result<bool> {
    let RunHistory { records, .. } = last_run(shared, key).await?;
    let companion = companion(key)?;
    for (_, token) in &records {
        let step = shared.step(|| shared.store.release(&companion, *token, None)).await;
        step.result.map_err(|error| error.with_key(key))?;
    }
    Ok(!records.is_empty())
}

/// Records a run, and releases the records of former runs that it replaces. The caller must hold the key.
pub(crate) async fn record(shared: &Shared, guard: &Guard, run: &RunRecord, former: RunHistory) -> Result<()> {
    let key = guard.key();
    let companion = companion(key)?;
    let keep = run.closed_for.max(MIN_RETENTION).min(*DURATION_RANGE.end());
    let outcome = loop {
        let token = TokenId::random()?;
        let request = AcquireRequest {
            key: companion.clone(),
            token,
            session: shared.valid_session().await?.id,
            demand: Demand::READ,
            lifetime: Lifetime::Fixed(keep),
            enqueue: false,
            not_after: shared.store_time().after(REQUEST_WINDOW),
            metadata: Some(run.write(token)),
            trace: None,
        };
        let step = shared.step(|| shared.store.acquire(request.clone())).await;
        let outcome = step.result.map_err(|error| error.with_key(key))?.outcome;
        // `Stale` means that the store was unavailable for longer than the request window. The store has recovered, and
        // that request neither had an effect nor will have one, so it is safe to send another one.
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
    fn run_record_round_trips() {
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
        assert_eq!(
            run.closed_for,
            *DURATION_RANGE.end(),
            "the record closes the key for longer than a call can request"
        );
        for text in ["", "1", "2 succeeded - 1 2 3 4 00000000000000000000000000000000 x", "1 succeeded - 1 2 3 4 zz x"]
        {
            assert_eq!(RunRecord::read(text, Duration::ZERO), None, "{text:?}");
        }
    }
}
