//! Histories: what was granted, believed and accepted, and whether that can be.
//!
//! Times are of one clock that all clients share, in any unit. The checks are exact; what they can say depends on what
//! was recorded, so a run that recorded too little is void, not good: see [`History::is_telling`].

use std::collections::HashMap;
use std::fmt;

/// One grant, as its client saw it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grant {
    /// The key.
    pub key: String,
    /// Who got it.
    pub client: usize,
    /// The fence.
    pub fence: u64,
    /// When the call was made.
    pub invoked: u64,
    /// When it returned.
    pub returned: u64,
    /// The last moment at which the client was seen to believe that it holds: at or after `returned`.
    pub believed_until: u64,
}

/// One write that was offered to a resource with its fence, in the order in which the resource saw them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Write {
    /// The key.
    pub key: String,
    /// The fence that was offered.
    pub fence: u64,
    /// Whether the resource took it.
    pub accepted: bool,
}

/// What happened in a run.
#[derive(Clone, Debug, Default)]
pub struct History {
    /// Grants in any order.
    pub grants: Vec<Grant>,
    /// Writes in the order in which the resource saw them.
    pub writes: Vec<Write>,
}

/// What cannot be.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Violation {
    /// Two grants of a key have the same fence.
    FenceRepeated(Box<[Grant; 2]>),
    /// A grant was asked for after another had returned, and has a lower fence.
    FenceOrder(Box<[Grant; 2]>),
    /// Two clients believed at once that they hold the key alone.
    BeliefsOverlap(Box<[Grant; 2]>),
    /// The resource took a write with a lower fence than it had taken before.
    StaleWrite {
        /// The highest fence before.
        highest: u64,
        /// The write.
        write: Write,
    },
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:#?}")
    }
}

impl History {
    /// Whether the run shows anything: grants of at least two clients that followed each other.
    pub fn is_telling(&self, least_grants: usize) -> bool {
        let hand_overs =
            self.by_key().values().any(|grants| grants.windows(2).any(|two| two[0].client != two[1].client));
        self.grants.len() >= least_grants && hand_overs
    }

    /// Fences are unique, and rise in the order of the grants.
    ///
    /// # Errors
    /// The first violation found.
    pub fn check_fences(&self) -> Result<(), Violation> {
        for grants in self.by_key().values() {
            let mut by_fence = grants.clone();
            by_fence.sort_by_key(|grant| grant.fence);
            for two in by_fence.windows(2) {
                if two[0].fence == two[1].fence {
                    return Err(Violation::FenceRepeated(Box::new([two[0].clone(), two[1].clone()])));
                }
            }
            // In order of fences, nobody may have been asked for later than one with a higher fence had returned.
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

    /// No two clients believe at once. Holds only while the stated assumptions about clocks and the store hold.
    ///
    /// # Errors
    /// The first violation found.
    pub fn check_beliefs(&self) -> Result<(), Violation> {
        for grants in self.by_key().values() {
            let mut longest: Option<&Grant> = None;
            for grant in grants {
                if let Some(before) = longest.filter(|before| before.believed_until > grant.returned) {
                    return Err(Violation::BeliefsOverlap(Box::new([(*before).clone(), (*grant).clone()])));
                }
                if longest.is_none_or(|longest| grant.believed_until > longest.believed_until) {
                    longest = Some(grant);
                }
            }
        }
        Ok(())
    }

    /// The resource never took a write with a lower fence than one before. Holds always.
    ///
    /// # Errors
    /// The first violation found.
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

    /// Grants of each key in order of their return.
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

    fn grant(client: usize, fence: u64, invoked: u64, returned: u64, believed_until: u64) -> Grant {
        Grant { key: "k".into(), client, fence, invoked, returned, believed_until }
    }

    fn of(grants: Vec<Grant>) -> History {
        History { grants, writes: vec![] }
    }

    #[test]
    fn good_history_passes() {
        // The second was asked for early and waited; the third has no order with it.
        let history = of(vec![grant(1, 1, 0, 1, 5), grant(2, 2, 0, 6, 9), grant(1, 3, 5, 10, 12)]);
        assert_eq!(history.check_fences(), Ok(()));
        assert_eq!(history.check_beliefs(), Ok(()));
        assert!(history.is_telling(3) && !history.is_telling(4));
        assert!(!of(vec![grant(1, 1, 0, 1, 2), grant(1, 2, 3, 4, 5)]).is_telling(1), "one client hands nothing over");
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
        assert_eq!(concurrent.check_fences(), Ok(()), "asked for before the other had returned");
    }

    #[test]
    fn overlapping_holders_are_found() {
        let history = of(vec![grant(1, 1, 0, 1, 20), grant(2, 2, 0, 21, 22), grant(3, 3, 0, 30, 31)]);
        assert_eq!(history.check_beliefs(), Ok(()));
        let history = of(vec![grant(1, 1, 0, 1, 100), grant(2, 2, 0, 2, 3)]);
        assert!(matches!(history.check_beliefs(), Err(Violation::BeliefsOverlap(..))));
        let history = of(vec![grant(1, 1, 0, 1, 25), grant(2, 2, 0, 25, 26), grant(3, 3, 0, 25, 27)]);
        assert!(matches!(history.check_beliefs(), Err(Violation::BeliefsOverlap(..))));
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
