//! Defines [`Fence`], the number that orders the grants of a key.

use std::fmt;

use crate::error::{Error, ErrorKind};

/// A fencing token: a number that strictly increases over all grants of one key.
///
/// Send it with every side effect, and let the resource reject a number below the highest that it has seen. Then a
/// holder that wakes up too late cannot do harm, even if its clock or its network failed. Fences of different keys have
/// no order.
///
/// A fence is `max(last + 1, the store's clock in µs since 1970)`. It stays below 2^53 until the year 2255, so a double
/// represents it exactly. `Display` pads it to 20 digits, so that text order is number order.
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
    /// Creates a fence from its number, as read from a resource or a log.
    pub const fn new(number: u64) -> Self {
        Self(number)
    }

    /// Returns the number.
    pub const fn get(self) -> u64 {
        self.0
    }

    /// Returns the next fence of a key, given its newest fence `last` and the store's clock in µs since 1970.
    ///
    /// It returns `None` if there is no higher number. A store then rejects all requests for the key, because a fence
    /// that repeats or falls is worse than no lock.
    ///
    /// For authors of stores: all stores share this rule.
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

    /// Returns the error for a key whose newest fence is the highest number that the store has.
    pub(crate) fn used_up() -> Error {
        let message = "the newest fence of this key is the highest number there is, so the key cannot be granted again; \
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
    fn next_fence_exceeds_last_and_follows_clock() {
        let next = |last: Option<u64>, clock| Fence::next(last.map(Fence::new), clock).map(Fence::get);
        assert_eq!(next(None, 5), Some(5));
        assert_eq!(next(Some(4), 5), Some(5));
        assert_eq!(next(Some(5), 5), Some(6));
        assert_eq!(next(Some(9), 5), Some(10), "a clock that stepped back changes nothing");
        assert_eq!(next(Some(u64::MAX - 1), 5), Some(u64::MAX));
        assert_eq!(next(Some(u64::MAX), 5), None, "a fence neither repeats nor falls");
        assert_eq!(next(Some(u64::MAX), u64::MAX), None);
    }

    #[test]
    fn text_order_matches_number_order() {
        let mut numbers = [0, 9, 10, 99, 1 << 53, u64::MAX];
        numbers.sort_by_key(|n| Fence::new(*n).to_string());
        assert!(numbers.is_sorted());
    }
}
