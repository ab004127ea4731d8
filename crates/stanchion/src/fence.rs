//! Fences: numbers that tell an older grant from a newer one.

use std::fmt;

use crate::error::{Error, ErrorKind};

/// A fencing token: strictly increasing over all grants of one key.
///
/// Send it with every side effect, and let the resource refuse a number below the highest it has seen: then a holder
/// that woke up too late cannot do harm, whatever happened to its clock or its network.
///
/// A fence is `max(last + 1, the store's clock in µs)`, below 2^53 until the year 2255, so that it is exact in a
/// double too. `Display` pads it to 20 digits: text order is number order.
///
/// ```
/// use stanchion::Fence;
///
/// let (old, new) = (Fence::new(7), Fence::new(1_000));
/// assert!(old < new);
/// assert!(old.to_string() < new.to_string());
/// assert_eq!("00000000000000000007".parse::<Fence>().unwrap(), old);
/// ```
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Fence(u64);

impl Fence {
    /// A fence from its number, as read from a resource or a log.
    pub const fn new(number: u64) -> Self {
        Self(number)
    }

    /// The number.
    pub const fn get(self) -> u64 {
        self.0
    }

    /// Returns the fence of a grant made when the store's clock shows `clock_us` and `last` was the newest fence of the
    /// key; `None` if there is no higher number. Then a store grants the key no more, because a fence that repeats or
    /// falls is worse than no lock.
    ///
    /// For store authors: one rule in one place, so that all stores count alike.
    #[must_use]
    pub const fn next(last: Option<Self>, clock_us: u64) -> Option<Self> {
        match last {
            Some(Self(last)) if last >= clock_us => match last.checked_add(1) {
                Some(next) => Some(Self(next)),
                None => None,
            },
            _ => Some(Self(clock_us)),
        }
    }

    /// The error of a key whose newest fence is the highest number that its store has.
    pub(crate) fn used_up() -> Error {
        let message = "the newest fence of this key is the highest number there is, so nobody can be granted the key; \
                       its record is damaged: delete it while nothing uses the key";
        Error::new(ErrorKind::Internal, message)
    }
}

impl fmt::Display for Fence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:020}", self.0)
    }
}

impl fmt::Debug for Fence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Fence({})", self.0)
    }
}

impl std::str::FromStr for Fence {
    type Err = std::num::ParseIntError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        text.parse().map(Self)
    }
}

impl From<Fence> for u64 {
    fn from(fence: Fence) -> Self {
        fence.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_next_fence_is_higher_than_the_last_and_not_behind_the_clock() {
        let next = |last: Option<u64>, clock| Fence::next(last.map(Fence::new), clock).map(Fence::get);
        assert_eq!(next(None, 5), Some(5));
        assert_eq!(next(Some(4), 5), Some(5));
        assert_eq!(next(Some(5), 5), Some(6));
        assert_eq!(next(Some(9), 5), Some(10), "a clock that stepped back changes nothing");
        assert_eq!(next(Some(u64::MAX - 1), 5), Some(u64::MAX));
        assert_eq!(next(Some(u64::MAX), 5), None, "no fence is repeated, and none falls");
        assert_eq!(next(Some(u64::MAX), u64::MAX), None);
    }

    #[test]
    fn text_order_is_number_order() {
        let mut numbers = [0, 9, 10, 99, 1 << 53, u64::MAX];
        numbers.sort_by_key(|n| Fence::new(*n).to_string());
        assert!(numbers.is_sorted());
    }
}
