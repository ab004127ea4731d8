//! Defines the bounds of a run with holds that linger.

use crate::config::{self, Config as StoreConfig};
use crate::linger::model::Lingering;
use crate::mutant::Mutation;
use crate::run::Bounds;

/// Bounds of one run. All times are in ticks. Arrays are by client.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// Name of the run.
    pub name: &'static str,
    /// Behaviour that the run explores.
    pub description: &'static str,
    /// Number of clients.
    pub clients: usize,
    /// Whether the client's calls let the key linger.
    pub lingers: [bool; 3],
    /// Number of calls that wait for the key.
    pub calls: [u8; 3],
    /// Number of calls that wait and never let the key linger, in a client whose other calls do.
    pub plain: [u8; 3],
    /// Number of attempts, which do not wait.
    pub attempts: [u8; 3],
    /// Lifetime of a session after a renewal.
    pub session_ttl: u8,
    /// Length of the lease, and of the time after a recall in which waiting calls are served.
    pub linger: u8,
    /// Time after which no more ticks happen.
    pub last_tick: u8,
    /// Number of fences per tick of the store's clock.
    pub fences_per_tick: u16,
    /// Maximum number of requests to linger per client.
    pub asks: u8,
    /// Maximum number of polls per client.
    pub polls: u8,
    /// Maximum number of renewals.
    pub renewals: [u8; 3],
    /// Maximum number of repeated releases per client.
    pub releases: u8,
    /// Maximum number of force-releases by an operator.
    pub force_releases: u8,
    /// Whether a push reports a force-release. Otherwise only renewals do.
    pub pushes_force_releases: bool,
    /// Whether the store may lose the key's records and fence counter once.
    pub forget: bool,
    /// Whether another store, which lacks the newest operations on the key, may take over once.
    pub failover: bool,
    /// Whether the clock of the fences may be set back once.
    pub set_back: bool,
    /// Whether the first client may detach its hold, which the other clients then adopt.
    pub adopt: bool,
    /// Whether each acquire has a second copy in flight.
    pub repeats: bool,
    /// Whether calls may give up.
    pub give_up: bool,
    /// Whether a turn takes time to reach its call, which may have given up.
    pub slow_turns: bool,
    /// Whether a guard may be lost although its session is alive.
    pub losses: bool,
    /// Whether a recall of a hold that was not used again makes all calls of the client plain.
    pub backs_off: bool,
    /// Whether the holder notices that another store answers than before.
    pub compares_lineage: bool,
    /// Minimum number of unique states. A run with fewer states did not explore its purpose.
    pub min_states: usize,
}

/// Number of unique states up to which a run is short.
const SHORT: usize = 100_000;

impl Config {
    /// Returns whether the run takes only a few seconds.
    pub fn is_short(&self) -> bool {
        self.min_states < SHORT
    }

    /// Returns the bounds of the store.
    pub fn store(&self) -> StoreConfig {
        StoreConfig {
            session_ttl: self.session_ttl,
            fences_per_tick: self.fences_per_tick,
            failover: self.failover,
            ..config::BASE
        }
    }
}

impl Bounds for Config {
    type Bounded = Lingering;

    fn name(&self) -> &'static str {
        self.name
    }

    fn description(&self) -> &'static str {
        self.description
    }

    fn min_states(&self) -> usize {
        self.min_states
    }

    fn model(self, broken: Option<Mutation>) -> Lingering {
        Lingering::new(self, broken)
    }
}

/// Bounds of the smallest run. The other runs change some of them.
pub const BASE: Config = Config {
    name: "linger-base",
    description: "a client that lingers with two calls, and one that does not",
    clients: 2,
    lingers: [true, false, false],
    calls: [2, 1, 0],
    plain: [0; 3],
    attempts: [0; 3],
    session_ttl: 4,
    linger: 2,
    last_tick: 3,
    fences_per_tick: 3,
    asks: 1,
    polls: 0,
    renewals: [0; 3],
    releases: 0,
    force_releases: 0,
    pushes_force_releases: true,
    forget: false,
    failover: false,
    set_back: false,
    adopt: false,
    repeats: false,
    give_up: false,
    slow_turns: false,
    losses: false,
    backs_off: false,
    compares_lineage: false,
    min_states: 33_000,
};
