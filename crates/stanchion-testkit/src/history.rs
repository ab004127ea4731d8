//! Checks recorded histories: the grants that clients got, how long each was valid, and the writes that a resource
//! accepted.
//!
//! All times come from one clock that the clients share, in any unit. The checks are exact, but a run that recorded too
//! little proves nothing: see [`History::is_conclusive`].

use std::collections::HashMap;
use std::fmt;

/// A grant as its client saw it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grant {
    /// The key.
    pub key: String,
    /// Number of the client that got the grant.
    pub client: usize,
    /// The fence of the grant.
    pub fence: u64,
    /// Time at which the client made the call.
    pub invoked: u64,
    /// Time at which the call returned.
    pub returned: u64,
    /// Last time at which the client's guard was seen to be valid, at or after `returned`.
    pub valid_until: u64,
}

/// A write that a client sent to a resource with its fence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Write {
    /// The key.
    pub key: String,
    /// The fence that the client sent.
    pub fence: u64,
    /// Whether the resource accepted the write.
    pub accepted: bool,
}

/// The recorded grants and writes of a run.
#[derive(Clone, Debug, Default)]
pub struct History {
    /// Grants, in any order.
    pub grants: Vec<Grant>,
    /// Writes, in the order in which the resource got them.
    pub writes: Vec<Write>,
}

/// Events of a history that contradict the contract.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Violation {
    /// Two grants of a key have the same fence.
    FenceRepeated(Box<[Grant; 2]>),
    /// A grant was requested after another one had returned, and has a lower fence.
    FenceOrder(Box<[Grant; 2]>),
    /// The grants of two clients for the same key were valid at the same time.
    HoldsOverlap(Box<[Grant; 2]>),
    /// The resource accepted a write with a lower fence than an earlier one.
    StaleWrite {
        /// The highest fence that was accepted before.
        highest: u64,
        /// The write with the lower fence.
        write: Write,
    },
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:#?}")
    }
}

impl History {
    /// Returns whether the run proves anything: it has at least `least_grants` grants, and a key passed between two
    /// clients.
    pub fn is_conclusive(&self, least_grants: usize) -> bool {
        let has_handoff =
            self.by_key().values().any(|grants| grants.windows(2).any(|two| two[0].client != two[1].client));
        self.grants.len() >= least_grants && has_handoff
    }

    /// Checks that fences are unique and rise in the order of the grants.
    ///
    /// # Errors
    /// Returns the first violation.
    pub fn check_fences(&self) -> Result<(), Violation> {
        for grants in self.by_key().values() {
            let mut by_fence = grants.clone();
            by_fence.sort_by_key(|grant| grant.fence);
            for two in by_fence.windows(2) {
                if two[0].fence == two[1].fence {
                    return Err(Violation::FenceRepeated(Box::new([two[0].clone(), two[1].clone()])));
                }
            }
            // No grant may have been requested after a grant with a higher fence had returned.
            let mut earliest_return: Option<&Grant> = None;
            for grant in by_fence.iter().rev() {
                if let Some(later) = earliest_return.filter(|later| later.returned < grant.invoked) {
                    return Err(Violation::FenceOrder(Box::new([(*later).clone(), (*grant).clone()])));
                }
                if earliest_return.is_none_or(|earliest| grant.returned < earliest.returned) {
                    earliest_return = Some(grant);
                }
            }
        }
        Ok(())
    }

    /// Checks that no two grants of a key were valid at the same time.
    ///
    /// A run passes only if the documented assumptions about clocks and the store were true during the run.
    ///
    /// # Errors
    /// Returns the first violation.
    pub fn check_exclusion(&self) -> Result<(), Violation> {
        for grants in self.by_key().values() {
            let mut longest: Option<&Grant> = None;
            for grant in grants {
                if let Some(before) = longest.filter(|before| before.valid_until > grant.returned) {
                    return Err(Violation::HoldsOverlap(Box::new([(*before).clone(), (*grant).clone()])));
                }
                if longest.is_none_or(|longest| grant.valid_until > longest.valid_until) {
                    longest = Some(grant);
                }
            }
        }
        Ok(())
    }

    /// Checks that the resource never accepted a write with a lower fence than an earlier one. Every run must pass.
    ///
    /// # Errors
    /// Returns the first violation.
    pub fn check_writes(&self) -> Result<(), Violation> {
        let mut highest: HashMap<&str, u64> = HashMap::new();
        for write in self.writes.iter().filter(|write| write.accepted) {
            let highest = highest.entry(&write.key).or_default();
            if write.fence < *highest {
                return Err(Violation::StaleWrite { highest: *highest, write: write.clone() });
            }
            *highest = write.fence;
        }
        Ok(())
    }

    /// Returns the grants of each key, in the order in which the calls returned.
    fn by_key(&self) -> HashMap<&str, Vec<&Grant>> {
        let mut keys: HashMap<&str, Vec<&Grant>> = HashMap::new();
        for grant in &self.grants {
            keys.entry(&grant.key).or_default().push(grant);
        }
        for grants in keys.values_mut() {
            grants.sort_by_key(|grant| grant.returned);
        }
        keys
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn grant(client: usize, fence: u64, invoked: u64, returned: u64, valid_until: u64) -> Grant {
        Grant { key: "k".into(), client, fence, invoked, returned, valid_until }
    }

    fn of(grants: Vec<Grant>) -> History {
        History { grants, writes: vec![] }
    }

    #[test]
    fn good_history_passes() {
        // The second request was sent early and waited. It overlaps the third, so neither comes first.
        let history = of(vec![grant(1, 1, 0, 1, 5), grant(2, 2, 0, 6, 9), grant(1, 3, 5, 10, 12)]);
        assert_eq!(history.check_fences(), Ok(()));
        assert_eq!(history.check_exclusion(), Ok(()));
        assert!(history.is_conclusive(3) && !history.is_conclusive(4));
        assert!(
            !of(vec![grant(1, 1, 0, 1, 2), grant(1, 2, 3, 4, 5)]).is_conclusive(1),
            "a single client has no hand-off"
        );
    }

    #[test]
    fn repeated_fence_is_found() {
        let history = of(vec![grant(1, 7, 0, 1, 2), grant(2, 7, 3, 4, 5)]);
        assert!(matches!(history.check_fences(), Err(Violation::FenceRepeated(..))));
    }

    #[test]
    fn falling_fence_is_found() {
        let history = of(vec![grant(1, 7, 0, 1, 2), grant(2, 6, 3, 4, 5)]);
        assert!(matches!(history.check_fences(), Err(Violation::FenceOrder(..))));
        let concurrent = of(vec![grant(1, 7, 0, 3, 3), grant(2, 6, 2, 4, 5)]);
        assert_eq!(concurrent.check_fences(), Ok(()), "concurrent calls may get fences in any order");
    }

    #[test]
    fn overlapping_holders_are_found() {
        let history = of(vec![grant(1, 1, 0, 1, 20), grant(2, 2, 0, 21, 22), grant(3, 3, 0, 30, 31)]);
        assert_eq!(history.check_exclusion(), Ok(()));
        let history = of(vec![grant(1, 1, 0, 1, 100), grant(2, 2, 0, 2, 3)]);
        assert!(matches!(history.check_exclusion(), Err(Violation::HoldsOverlap(..))));
        let history = of(vec![grant(1, 1, 0, 1, 25), grant(2, 2, 0, 25, 26), grant(3, 3, 0, 25, 27)]);
        assert!(matches!(history.check_exclusion(), Err(Violation::HoldsOverlap(..))));
    }

    #[test]
    fn stale_write_is_found() {
        let write = |fence, accepted| Write { key: "k".into(), fence, accepted };
        let good =
            History { grants: vec![], writes: vec![write(1, true), write(3, true), write(2, false), write(3, true)] };
        assert_eq!(good.check_writes(), Ok(()));
        let bad = History { grants: vec![], writes: vec![write(3, true), write(2, true)] };
        assert!(matches!(bad.check_writes(), Err(Violation::StaleWrite { highest: 3, .. })));
    }
}
