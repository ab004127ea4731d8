//! Estimates the store's time from its answers.

use std::sync::{Mutex, PoisonError};

use crate::clock::{BootTime, Clock};
use crate::store::StoreTime;

/// The store's time by its last answer and the time that has passed since.
#[derive(Debug, Default)]
pub(crate) struct StoreClock(Mutex<Option<Answer>>);

/// A time of the store, and the time here when its answer was read.
#[derive(Clone, Copy, Debug)]
struct Answer {
    time: StoreTime,
    at: BootTime,
}

impl StoreClock {
    /// Takes the time of an answer to a request that was sent at `sent_at`.
    pub(crate) fn observe(&self, time: StoreTime, sent_at: BootTime, clock: &Clock) {
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let now = clock.now();
        // An answer that took long to arrive has an old time, and is ignored. A time that is older than the journey explains
        // comes from a clock that was set back, and is followed.
        let is_late = last.is_some_and(|last| {
            let known = last.time.after(now.since(last.at));
            time < known && known <= time.after(now.since(sent_at))
        });
        if !is_late {
            *last = Some(Answer { time, at: now });
        }
    }

    /// Returns the estimate. Except for drift it is never ahead of the store.
    pub(crate) fn now(&self, clock: &Clock) -> StoreTime {
        let last = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        last.map_or(StoreTime::from_micros(0), |last| last.time.after(clock.now().since(last.at)))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::clock::VirtualClock;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn late_answer_does_not_set_the_clock_back() {
        let time = VirtualClock::new();
        let (clock, store) = (time.clock(), StoreClock::default());
        let (start, noon) = (clock.now(), StoreTime::from_micros(1_000_000_000));
        store.observe(noon, start, &clock);
        time.advance(3 * SECOND);
        store.observe(noon.after(SECOND), start, &clock);
        assert_eq!(store.now(&clock), noon.after(3 * SECOND));
        // The answer took no time: the store's clock was set back.
        store.observe(noon.after(SECOND), clock.now(), &clock);
        assert_eq!(store.now(&clock), noon.after(SECOND));
    }
}
