//! Defines the bounds of a run: the events that may happen, and how often. Each run is small enough to visit all its
//! states.

/// Lifetime of a hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Lifetime {
    /// The hold ends with its session.
    Session,
    /// The hold ends at its own deadline.
    Fixed,
    /// The hold ends at its own deadline or with its session.
    Both,
}

impl Lifetime {
    /// Returns whether the hold has its own deadline.
    pub fn has_deadline(self) -> bool {
        self != Self::Session
    }

    /// Returns whether the hold ends with its session.
    pub fn is_bound(self) -> bool {
        self != Self::Fixed
    }
}

/// Share of the key that a call requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Demand {
    /// Number of units.
    pub units: u8,
    /// Capacity of the key according to this call. A call for all units is exclusive.
    pub capacity: u8,
}

/// Bounds of one run. All times are in ticks.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// Name of the run.
    pub name: &'static str,
    /// Behaviour that the run explores.
    pub description: &'static str,
    /// Number of clients. Each is one process with one session.
    pub clients: usize,
    /// Number of calls of each client.
    pub calls: [usize; 3],
    /// Lifetime that each client requests.
    pub lifetimes: [Lifetime; 3],
    /// Lifetime of a session after a renewal.
    pub session_ttl: u8,
    /// Length of a fixed lifetime.
    pub fixed_ttl: u8,
    /// Time after its first acquire during which the store may enter a token.
    pub window: u8,
    /// Time after which no more ticks happen.
    pub last_tick: u8,
    /// Demand of each client. The last one also applies to the detached hold.
    pub demands: [Demand; 3],
    /// Maximum number of times that a call sends `acquire` or `adopt`.
    pub acquires: u8,
    /// Maximum number of times that a call sends `poll`.
    pub polls: u8,
    /// Maximum number of times that a call sends `release` or `abandon`.
    pub releases: u8,
    /// Maximum number of times that a call sends `extend`.
    pub extends: u8,
    /// Lifetimes that the first extension and the later ones request.
    pub extend_by: [u8; 2],
    /// Maximum number of writes to the fenced resource per call.
    pub writes: u8,
    /// Maximum number of renewals per session.
    pub renewals: u8,
    /// Number of clients, from the first on, that never renew.
    pub never_renewing: usize,
    /// Maximum number of force-releases by an operator.
    pub force_releases: u8,
    /// Whether callers may give up before the grant.
    pub give_up: bool,
    /// Whether the store's operations on the key ignore sessions. A contender then reads the session and expires its
    /// holds in a separate operation.
    pub blind: bool,
    /// Whether the store may lose the key's records and fence counter once.
    pub forget: bool,
    /// Whether the calls adopt one detached hold instead of acquiring a new one. A detached session-bound hold belongs
    /// to a session that stays alive.
    pub adopt: bool,
    /// Whether sessions may be closed.
    pub close: bool,
    /// Whether another store may take over once. The new store has all sessions but lacks the newest operations on the
    /// key.
    pub failover: bool,
    /// Whether a hold may stay in the store without a valid guard, because it is detached, or lost and in its grace.
    pub detaches: bool,
    /// Maximum number of repeated requests to open a session.
    pub opens: u8,
    /// Number of fences per tick of the store's clock.
    pub fences_per_tick: u16,
    /// Minimum number of unique states. A run with fewer states did not explore its purpose.
    pub min_states: usize,
}

impl Config {
    /// Returns the demand of a client.
    pub fn demand(&self, client: u8) -> Demand {
        self.demands[usize::from(client).min(2)]
    }

    /// Returns the lifetime that the extension of this number requests, counting from 1.
    pub fn extension(&self, nth: u8) -> u8 {
        self.extend_by[usize::from(nth > 1)]
    }
}

/// Returns a demand for `units` of a key of `capacity`.
pub const fn of(units: u8, capacity: u8) -> Demand {
    Demand { units, capacity }
}

/// Bounds of the smallest run. The other runs change some of them.
pub const BASE: Config = Config {
    name: "base",
    description: "one call per client, no repeated requests",
    clients: 2,
    calls: [1; 3],
    lifetimes: [Lifetime::Session; 3],
    session_ttl: 2,
    fixed_ttl: 2,
    window: 1,
    last_tick: 3,
    demands: [of(1, 1); 3],
    acquires: 1,
    polls: 0,
    releases: 1,
    extends: 0,
    extend_by: [2; 2],
    writes: 0,
    renewals: 1,
    never_renewing: 0,
    force_releases: 0,
    give_up: true,
    blind: false,
    forget: false,
    adopt: false,
    close: false,
    failover: false,
    detaches: false,
    opens: 0,
    fences_per_tick: 8,
    min_states: 1_000,
};
