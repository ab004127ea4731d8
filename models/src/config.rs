//! Configurations: what may happen in a run, and how often. Every run is small enough to visit all its states.

/// How long a hold lasts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Term {
    /// As long as the session lives.
    Session,
    /// Its own deadline.
    Fixed,
    /// Its own deadline, and no longer than the session lives.
    Both,
}

impl Term {
    /// Whether it has a deadline of its own.
    pub fn has_deadline(self) -> bool {
        self != Self::Session
    }

    /// Whether it ends with its session.
    pub fn is_bound(self) -> bool {
        self != Self::Fixed
    }
}

/// How much of the key a call takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Demand {
    /// What it takes.
    pub units: u8,
    /// What it says the key has. A call that takes all of it is exclusive.
    pub capacity: u8,
}

/// The bounds of one run. All times are ticks.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// The name of the run.
    pub name: &'static str,
    /// What it looks at.
    pub about: &'static str,
    /// Clients; each is one process with one session.
    pub clients: usize,
    /// Calls of each client.
    pub calls: [usize; 3],
    /// The term that each client asks for.
    pub terms: [Term; 3],
    /// How long a session lives after a beat.
    pub session_ttl: u8,
    /// How long a fixed term is.
    pub fixed_ttl: u8,
    /// How long after its first question a token may be created.
    pub window: u8,
    /// No tick after this time.
    pub last_tick: u8,
    /// How much each client takes. The last one is for what is detached, too.
    pub demands: [Demand; 3],
    /// How often a call sends `acquire` (or `adopt`).
    pub asks: u8,
    /// How often a call sends `poll`.
    pub polls: u8,
    /// How often a call sends `release` or `abandon`.
    pub ends: u8,
    /// How often a call sends `extend`.
    pub extends: u8,
    /// The terms that the first extension, and those after it, ask for.
    pub extend_by: [u8; 2],
    /// How often a call writes to the fenced resource.
    pub writes: u8,
    /// How often a session beats.
    pub beats: u8,
    /// So many of the first clients never beat.
    pub quiet: usize,
    /// Forced releases by an operator.
    pub forces: u8,
    /// Calls may be given up before they are granted.
    pub give_up: bool,
    /// The lock's step does not see sessions: a contender reads the session and evicts by a step of its own.
    pub blind: bool,
    /// Records and fence counter may be lost once.
    pub forget: bool,
    /// The calls take up one detached hold instead of asking for a new one. A detached session hold hangs on a session
    /// that lives on.
    pub adopt: bool,
    /// A session may be closed.
    pub close: bool,
    /// Once, another store takes over that lacks the newest steps on the key; it has all sessions.
    pub failover: bool,
    /// A hold may be kept in the store without anybody who believes it: detached, or lost and in its grace.
    pub keeps: bool,
    /// How often the opening of a session is repeated.
    pub opens: u8,
    /// Fences per tick of the store's clock.
    pub fences_per_tick: u16,
    /// Fewer unique states than this mean that the run did not look at what it should.
    pub floor: usize,
}

impl Config {
    /// What the client takes.
    pub fn demand(&self, client: u8) -> Demand {
        self.demands[usize::from(client).min(2)]
    }

    /// The term that the extension of this number asks for, counted from one.
    pub fn extension(&self, nth: u8) -> u8 {
        self.extend_by[usize::from(nth > 1)]
    }
}

/// `units` of a key of `capacity`.
pub const fn of(units: u8, capacity: u8) -> Demand {
    Demand { units, capacity }
}

/// The smallest run, on which the others are built.
pub const BASE: Config = Config {
    name: "base",
    about: "one call each, nothing repeated",
    clients: 2,
    calls: [1; 3],
    terms: [Term::Session; 3],
    session_ttl: 2,
    fixed_ttl: 2,
    window: 1,
    last_tick: 3,
    demands: [of(1, 1); 3],
    asks: 1,
    polls: 0,
    ends: 1,
    extends: 0,
    extend_by: [2; 2],
    writes: 0,
    beats: 1,
    quiet: 0,
    forces: 0,
    give_up: true,
    blind: false,
    forget: false,
    adopt: false,
    close: false,
    failover: false,
    keeps: false,
    opens: 0,
    fences_per_tick: 8,
    floor: 1_000,
};
