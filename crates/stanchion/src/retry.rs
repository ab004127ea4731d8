//! Retries an operation of the store after transient faults. Waiting for a held key is done elsewhere.

use std::future::Future;
use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBuilder};
use tokio::sync::Notify;

use crate::clock::{BootTime, Clock, jitter, jitter_seed};
use crate::error::{Error, ErrorKind, Result};

/// Limits how an operation is retried after a transient fault. The number of attempts and the total time are both limited, and the
/// pauses between attempts double, with jitter. Contention is not a fault.
///
/// A call that waits for a key uses its wait limit instead of [`attempts`](Self::attempts) and [`total`](Self::total):
/// it keeps trying until that limit. Without a wait limit the policy applies until the store has answered the call once;
/// from then on the call waits through an outage of any length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RetryPolicy {
    /// Maximum number of attempts of one operation, including the first. Default: 8.
    pub attempts: u32,
    /// Maximum time for one operation with all its attempts, and for opening a handle. Default: 10 s.
    pub total: Duration,
    /// Maximum time for a call that does not wait for its key ([`try_lock`](crate::Locks::try_lock)), with all its
    /// attempts. Default: 1 s. Raise it for a slower store.
    pub no_wait: Duration,
    /// Maximum time for the answer to one attempt. Default: 2 s.
    pub attempt: Duration,
    /// Length of the first pause. Default: 20 ms.
    pub pause: Duration,
    /// Maximum length of a pause. Default: 1 s.
    pub longest_pause: Duration,
}

impl Default for RetryPolicy {
    fn default() -> Self {
        Self {
            attempts: 8,
            total: Duration::from_secs(10),
            no_wait: Duration::from_secs(1),
            attempt: Duration::from_secs(2),
            pause: Duration::from_millis(20),
            longest_pause: Duration::from_secs(1),
        }
    }
}

impl RetryPolicy {
    /// Returns a policy with one attempt and no retries.
    pub fn never() -> Self {
        Self { attempts: 1, ..Self::default() }
    }

    /// Returns the pauses between attempts: one fewer than attempts.
    pub(crate) fn pauses(&self) -> impl Iterator<Item = Duration> + Send + use<> {
        self.backoff().with_max_times(self.attempts.saturating_sub(1) as usize).build()
    }

    /// Returns pauses without an end, for work that must be finished.
    pub(crate) fn endless_pauses(&self) -> impl Iterator<Item = Duration> + Send + use<> {
        self.backoff().without_max_times().build()
    }

    /// Returns the pause after this number of failures, for work that must be finished and keeps no iterator.
    pub(crate) fn pause_after(&self, failures: u32) -> Duration {
        jitter(self.pause.saturating_mul(1 << failures.min(20)).min(self.longest_pause * 4 / 5))
    }

    fn backoff(&self) -> ExponentialBuilder {
        ExponentialBuilder::default()
            .with_factor(2.0)
            .with_min_delay(self.pause)
            // The jitter adds up to the same length again.
            .with_max_delay(self.longest_pause / 2)
            .with_jitter()
            .with_jitter_seed(jitter_seed())
    }
}

/// The result of an operation with all its attempts.
pub(crate) struct Repeated<T> {
    pub(crate) result: Result<T>,
    /// Whether an attempt had no answer and may have had an effect: its request may still be on its way.
    pub(crate) unanswered: bool,
}

/// How long an operation is retried.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Patience {
    /// Whether the retry policy limits it.
    pub(crate) by_policy: bool,
    /// The caller's own limit.
    pub(crate) until: BootTime,
}

impl Patience {
    pub(crate) const POLICY: Self = Self { by_policy: true, until: BootTime::NEVER };
}

/// Time after which a request without an answer counts as a fault of the store.
const LONG_SILENCE: Duration = Duration::from_millis(500);

/// Returns the fault of a store that has not answered for a long time, or `None` if the time is short.
pub(crate) fn silence(lasting: Duration) -> Option<Error> {
    (lasting >= LONG_SILENCE).then(|| no_answer_within(lasting))
}

fn no_answer_within(limit: Duration) -> Error {
    Error::new(ErrorKind::NetworkTimeout, format!("no answer within {limit:.1?}"))
}

/// Returns the error of a caller's own limit.
pub(crate) fn out_of_time() -> Error {
    Error::new(ErrorKind::Timeout, "the time limit is over")
}

/// Retries an operation after transient faults.
///
/// `attempt` must be idempotent. `store_recovered` ends a pause early. At the caller's own limit the result is the store's fault if
/// the store was failing, and [`out_of_time`] otherwise.
pub(crate) async fn repeat<T, F>(
    clock: &Clock,
    policy: &RetryPolicy,
    patience: Patience,
    store_recovered: &Notify,
    mut attempt: impl FnMut() -> F,
) -> Repeated<T>
where
    F: Future<Output = Result<T>>,
{
    let give_up_at = if patience.by_policy { clock.now().after(policy.total) } else { BootTime::NEVER };
    let mut left = if patience.by_policy { policy.attempts } else { u32::MAX };
    let mut pauses = None;
    let mut unanswered = false;
    let mut last_fault = None;
    loop {
        // The last attempt gets only the time that is left.
        let limit = policy.attempt.min(give_up_at.min(patience.until).since(clock.now()));
        let error = match answer_within(clock, limit, attempt()).await {
            Some(Ok(value)) => return Repeated { result: Ok(value), unanswered },
            Some(Err(error)) => error,
            None if clock.now() >= patience.until => {
                // The fault of an earlier attempt may say more.
                let fault = last_fault.or_else(|| silence(limit));
                return Repeated { result: Err(fault.unwrap_or_else(out_of_time)), unanswered: true };
            }
            None => no_answer_within(limit),
        };
        unanswered |= error.is_in_doubt();
        left = left.saturating_sub(1);
        let pause = pauses.get_or_insert_with(|| policy.endless_pauses()).next().unwrap_or(policy.longest_pause);
        let pause = pause.max(error.retry_after().unwrap_or_default());
        if left == 0 || !error.is_transient() || clock.now().after(pause) >= give_up_at {
            // An earlier attempt may have had an effect, even if the last attempt had none.
            let result = Err(if unanswered { error.in_doubt(true) } else { error });
            return Repeated { result, unanswered };
        }
        let pause = pause.min(patience.until.since(clock.now()));
        sleep_unless_recovered(clock, pause, store_recovered).await;
        if clock.now() >= patience.until {
            return Repeated { result: Err(error), unanswered };
        }
        last_fault = Some(error);
    }
}

/// Pauses after a fault. The pause ends early when the store recovers, so that no call waits longer than the outage.
pub(crate) async fn sleep_unless_recovered(clock: &Clock, pause: Duration, store_recovered: &Notify) {
    tokio::select! {
        () = clock.sleep(pause) => {}
        () = store_recovered.notified() => {}
    }
}

/// Runs one attempt with a time limit for its answer.
pub(crate) async fn limited<T>(clock: &Clock, limit: Duration, attempt: impl Future<Output = Result<T>>) -> Result<T> {
    answer_within(clock, limit, attempt).await.unwrap_or_else(|| Err(no_answer_within(limit)))
}

/// Returns the result of an attempt, or `None` if it has none within the limit.
async fn answer_within<T>(clock: &Clock, limit: Duration, attempt: impl Future<Output = T>) -> Option<T> {
    tokio::select! {
        biased;
        result = attempt => Some(result),
        () = clock.sleep(limit) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::VirtualClock;
    use std::cell::Cell;

    fn policy() -> RetryPolicy {
        RetryPolicy {
            pause: Duration::from_millis(1),
            longest_pause: Duration::from_millis(4),
            ..RetryPolicy::default()
        }
    }

    /// Runs a future on a virtual clock that advances whenever every task sleeps.
    async fn skipping_time<T>(time: &VirtualClock, work: impl Future<Output = T>) -> T {
        tokio::select! {
            biased;
            value = work => value,
            () = async { loop { tokio::task::yield_now().await; time.advance(Duration::from_millis(1)); } } => unreachable!(),
        }
    }

    #[tokio::test]
    async fn only_transient_faults_are_retried() {
        let time = VirtualClock::new();
        let clock = time.clock();
        for (kind, expected) in
            [(ErrorKind::Unavailable, 8), (ErrorKind::Unauthorized, 1), (ErrorKind::NetworkTimeout, 8)]
        {
            let count = Cell::new(0);
            let (policy, never) = (policy(), Notify::new());
            let work = repeat(&clock, &policy, Patience::POLICY, &never, || {
                count.set(count.get() + 1);
                async move { Err::<(), _>(Error::new(kind, "x")) }
            });
            let repeated = skipping_time(&time, work).await;
            assert_eq!(repeated.result.unwrap_err().kind(), kind);
            assert_eq!(count.get(), expected, "{kind:?}");
            assert_eq!(repeated.unanswered, kind == ErrorKind::NetworkTimeout);
        }
    }

    #[tokio::test]
    async fn unanswered_attempt_ends_at_its_limit() {
        let time = VirtualClock::new();
        let clock = time.clock();
        let policy = RetryPolicy { attempts: 2, attempt: Duration::from_millis(50), ..policy() };
        let start = clock.now();
        let never = Notify::new();
        let work = repeat(&clock, &policy, Patience::POLICY, &never, std::future::pending::<Result<()>>);
        let repeated = skipping_time(&time, work).await;
        assert_eq!(repeated.result.unwrap_err().kind(), ErrorKind::NetworkTimeout);
        assert!(repeated.unanswered);
        assert!(clock.now().since(start) >= Duration::from_millis(100));
    }

    #[test]
    fn pauses_have_a_longest() {
        let policy = RetryPolicy::default();
        assert!((0..100).all(|_| policy.endless_pauses().take(20).all(|pause| pause <= policy.longest_pause)));
    }

    #[tokio::test]
    async fn recovery_of_the_store_ends_a_pause() {
        let clock = VirtualClock::new().clock();
        let back = Notify::new();
        let tried = Cell::new(0);
        let policy = RetryPolicy::default();
        let work = repeat(&clock, &policy, Patience::POLICY, &back, || {
            tried.set(tried.get() + 1);
            let answer = if tried.get() < 3 { Err(Error::new(ErrorKind::Unavailable, "x")) } else { Ok(()) };
            async move { answer }
        });
        // The clock does not advance.
        let repeated = tokio::select! {
            biased;
            repeated = work => repeated,
            () = async { loop { tokio::task::yield_now().await; back.notify_waiters(); } } => unreachable!(),
        };
        assert!(repeated.result.is_ok());
    }

    #[tokio::test]
    async fn the_total_time_is_limited_too() {
        let time = VirtualClock::new();
        let clock = time.clock();
        let policy = RetryPolicy { attempts: 1_000, total: Duration::from_millis(40), ..policy() };
        let start = clock.now();
        let never = Notify::new();
        let work = repeat(&clock, &policy, Patience::POLICY, &never, || async {
            Err::<(), _>(Error::new(ErrorKind::Unavailable, "x"))
        });
        assert!(skipping_time(&time, work).await.result.is_err());
        assert!(clock.now().since(start) <= Duration::from_millis(41));
    }

    #[tokio::test]
    async fn lost_answer_leaves_the_outcome_unknown() {
        let time = VirtualClock::new();
        for last in [ErrorKind::Unavailable, ErrorKind::Unauthorized] {
            let (tried, never, policy) = (Cell::new(0), Notify::new(), policy());
            let clock = time.clock();
            let work = repeat(&clock, &policy, Patience::POLICY, &never, || {
                tried.set(tried.get() + 1);
                let kind = if tried.get() == 1 { ErrorKind::NetworkTimeout } else { last };
                async move { Err::<(), _>(Error::new(kind, "x")) }
            });
            let error = skipping_time(&time, work).await.result.unwrap_err();
            assert!(error.kind() == last && error.is_in_doubt(), "{error:?}");
        }
    }

    #[tokio::test]
    async fn last_attempt_ends_with_the_total_time() {
        let time = VirtualClock::new();
        let clock = time.clock();
        let policy = RetryPolicy { total: Duration::from_millis(150), attempt: Duration::from_millis(100), ..policy() };
        let start = clock.now();
        let never = Notify::new();
        let work = repeat(&clock, &policy, Patience::POLICY, &never, std::future::pending::<Result<()>>);
        assert!(skipping_time(&time, work).await.result.is_err());
        assert!(clock.now().since(start) <= Duration::from_millis(151), "{:?}", clock.now().since(start));
    }

    #[tokio::test]
    async fn endless_operation_outlives_the_policy() {
        let time = VirtualClock::new();
        let clock = time.clock();
        let policy = RetryPolicy { attempts: 2, total: Duration::from_millis(10), ..policy() };
        let (tried, never) = (Cell::new(0), Notify::new());
        let work = repeat(&clock, &policy, Patience { by_policy: false, until: BootTime::NEVER }, &never, || {
            tried.set(tried.get() + 1);
            let answer = if tried.get() < 100 { Err(Error::new(ErrorKind::Unavailable, "x")) } else { Ok(()) };
            async move { answer }
        });
        assert!(skipping_time(&time, work).await.result.is_ok());
    }
    /// At the caller's limit the error is the store's last fault, a long silence, or that the time is over.
    #[tokio::test]
    async fn limit_of_the_caller_ends_an_operation() {
        const LIMIT: Duration = Duration::from_secs(3);
        let attempt = |answers: bool| async move {
            if !answers {
                std::future::pending::<()>().await;
            }
            Err::<(), _>(Error::new(ErrorKind::Unavailable, "x"))
        };
        for (longest_attempt, answers, expected) in [
            (LIMIT * 2, false, ErrorKind::NetworkTimeout),
            (LIMIT * 2, true, ErrorKind::Unavailable),
            (LIMIT / 100, true, ErrorKind::Unavailable),
        ] {
            let time = VirtualClock::new();
            let clock = time.clock();
            let policy = RetryPolicy { attempt: longest_attempt, ..policy() };
            let (start, never) = (clock.now(), Notify::new());
            let patience = Patience { by_policy: false, until: start.after(LIMIT) };
            let repeated = skipping_time(&time, repeat(&clock, &policy, patience, &never, || attempt(answers))).await;
            assert_eq!(repeated.result.unwrap_err().kind(), expected);
            assert_eq!(repeated.unanswered, !answers);
            let took = clock.now().since(start);
            assert!(took >= LIMIT && took <= LIMIT + Duration::from_millis(2), "{took:?}");
        }
        // A short silence is no fault of the store.
        let time = VirtualClock::new();
        let clock = time.clock();
        let patience = Patience { by_policy: true, until: clock.now().after(Duration::from_millis(400)) };
        let (policy, never) = (policy(), Notify::new());
        let repeated = skipping_time(&time, repeat(&clock, &policy, patience, &never, || attempt(false))).await;
        assert_eq!(repeated.result.unwrap_err().kind(), ErrorKind::Timeout);
        assert!(repeated.unanswered);
    }
}
