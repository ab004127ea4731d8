//! Defines the runs of the unbroken protocol. Each run visits all its states.

use crate::config::{BASE, Config, Lifetime::Both, Lifetime::Fixed, Lifetime::Session, of};

/// Returns the runs that the tests check.
pub fn all() -> Vec<Config> {
    vec![
        Config { min_states: 297_000, ..BASE },
        Config { name: "waiter", description: "a waiter polls", give_up: false, polls: 2, min_states: 207_000, ..BASE },
        Config {
            name: "retry",
            description: "the first acquire is repeated",
            acquires: 2,
            renewals: 0,
            last_tick: 3,
            min_states: 61_000,
            ..BASE
        },
        Config {
            name: "retry-poll",
            description: "acquires are repeated, and waiters poll",
            acquires: 2,
            polls: 1,
            renewals: 0,
            give_up: false,
            min_states: 31_000,
            ..BASE
        },
        Config {
            name: "releases",
            description: "releases are repeated",
            releases: 2,
            renewals: 0,
            min_states: 30_000,
            ..BASE
        },
        Config {
            name: "renewals",
            description: "sessions of three ticks, slow renewals",
            session_ttl: 3,
            last_tick: 5,
            renewals: 1,
            give_up: false,
            min_states: 721_000,
            ..BASE
        },
        Config {
            name: "blind",
            description: "holds expire in a separate operation",
            blind: true,
            min_states: 290_000,
            ..BASE
        },
        Config {
            name: "blind-poll",
            description: "holds expire in a separate operation, and a waiter polls",
            blind: true,
            give_up: false,
            polls: 1,
            last_tick: 4,
            min_states: 125_000,
            ..BASE
        },
        Config {
            name: "fixed",
            description: "fixed lifetimes, repeated acquires and polls; sessions outlive the holds",
            lifetimes: [Fixed; 3],
            acquires: 2,
            polls: 1,
            renewals: 0,
            give_up: false,
            session_ttl: 4,
            last_tick: 4,
            min_states: 1_288_000,
            ..BASE
        },
        Config {
            name: "fixed-session",
            description: "the holder has a fixed lifetime, the waiter a session-bound one",
            lifetimes: [Fixed, Session, Session],
            polls: 1,
            give_up: false,
            last_tick: 4,
            min_states: 241_000,
            ..BASE
        },
        Config {
            name: "extend",
            description: "fixed lifetimes are extended",
            lifetimes: [Fixed; 3],
            extends: 2,
            polls: 1,
            renewals: 0,
            give_up: false,
            last_tick: 5,
            min_states: 1_049_000,
            ..BASE
        },
        Config {
            name: "extend-shorter",
            description: "fixed lifetimes are extended, first to a shorter one",
            lifetimes: [Fixed; 3],
            fixed_ttl: 3,
            extends: 2,
            extend_by: [1, 3],
            renewals: 0,
            give_up: false,
            last_tick: 4,
            min_states: 414_000,
            ..BASE
        },
        Config {
            name: "both",
            description: "lifetimes end with their session or before it",
            lifetimes: [Both; 3],
            polls: 1,
            renewals: 1,
            give_up: false,
            last_tick: 4,
            min_states: 141_000,
            ..BASE
        },
        Config {
            name: "both-extend",
            description: "lifetimes end with their session or before it, and are extended",
            lifetimes: [Both, Session, Session],
            extends: 2,
            extend_by: [3, 1],
            renewals: 1,
            give_up: false,
            last_tick: 3,
            min_states: 642_000,
            ..BASE
        },
        Config {
            name: "force",
            description: "force-release",
            force_releases: 1,
            last_tick: 3,
            give_up: false,
            min_states: 452_000,
            ..BASE
        },
        Config {
            name: "force-retry",
            description: "force-release and repeated acquires",
            force_releases: 1,
            acquires: 2,
            polls: 1,
            last_tick: 2,
            renewals: 0,
            give_up: false,
            min_states: 221_000,
            ..BASE
        },
        Config {
            name: "force-fixed",
            description: "force-release of fixed lifetimes",
            force_releases: 1,
            lifetimes: [Fixed; 3],
            fixed_ttl: 3,
            last_tick: 4,
            extends: 0,
            polls: 1,
            renewals: 0,
            give_up: false,
            min_states: 65_000,
            ..BASE
        },
        Config {
            name: "two-calls",
            description: "one client has two calls",
            calls: [2, 1, 0],
            renewals: 0,
            last_tick: 3,
            min_states: 261_000,
            ..BASE
        },
        Config {
            name: "three",
            description: "three clients, one of them renews",
            clients: 3,
            renewals: 1,
            never_renewing: 2,
            last_tick: 3,
            give_up: false,
            min_states: 126_000,
            ..BASE
        },
        Config {
            name: "room-for-two",
            description: "three clients, capacity 2",
            clients: 3,
            demands: [of(1, 2); 3],
            renewals: 0,
            last_tick: 3,
            give_up: false,
            min_states: 31_000,
            ..BASE
        },
        Config {
            name: "kinds",
            description: "a mutex, a reader and a permit",
            clients: 3,
            demands: [of(1, 1), of(1, 9), of(1, 2)],
            renewals: 0,
            last_tick: 3,
            give_up: false,
            min_states: 20_000,
            ..BASE
        },
        Config {
            name: "limits",
            description: "permits with different capacities",
            clients: 3,
            demands: [of(1, 2), of(2, 3), of(1, 3)],
            renewals: 0,
            last_tick: 3,
            give_up: false,
            min_states: 25_000,
            ..BASE
        },
        Config {
            name: "resource",
            description: "writes to a fenced resource",
            writes: 1,
            renewals: 1,
            give_up: false,
            last_tick: 4,
            min_states: 301_000,
            ..BASE
        },
        Config {
            name: "forget",
            description: "the store loses its records and fence counter",
            forget: true,
            calls: [2, 1, 0],
            writes: 1,
            renewals: 0,
            give_up: false,
            last_tick: 3,
            min_states: 332_000,
            ..BASE
        },
        Config {
            name: "adopt",
            description: "two clients adopt one detached hold",
            adopt: true,
            lifetimes: [Fixed; 3],
            acquires: 2,
            extends: 0,
            renewals: 0,
            last_tick: 4,
            fixed_ttl: 3,
            min_states: 191_000,
            ..BASE
        },
        Config {
            name: "adopt-session",
            description: "two clients adopt one detached session-bound hold",
            adopt: true,
            acquires: 2,
            renewals: 0,
            session_ttl: 3,
            last_tick: 3,
            min_states: 45_000,
            ..BASE
        },
        Config {
            name: "blind-retry",
            description: "holds expire in a separate operation, repeated acquires",
            blind: true,
            acquires: 2,
            renewals: 1,
            never_renewing: 1,
            last_tick: 3,
            give_up: false,
            min_states: 93_000,
            ..BASE
        },
        Config {
            name: "blind-force",
            description: "holds expire in a separate operation, with a force-release",
            blind: true,
            force_releases: 1,
            acquires: 2,
            polls: 1,
            renewals: 0,
            give_up: false,
            last_tick: 4,
            min_states: 371_000,
            ..BASE
        },
        Config {
            name: "blind-three",
            description: "holds expire in a separate operation, three clients, one of them renews",
            blind: true,
            clients: 3,
            renewals: 1,
            never_renewing: 2,
            give_up: false,
            min_states: 119_000,
            ..BASE
        },
        Config {
            name: "two-calls-retry",
            description: "one client has two calls, repeated acquires, no caller gives up",
            calls: [2, 1, 0],
            acquires: 2,
            renewals: 0,
            last_tick: 2,
            give_up: false,
            min_states: 749_000,
            ..BASE
        },
        Config {
            name: "fixed-give-up",
            description: "fixed lifetimes, repeated acquires, callers give up",
            lifetimes: [Fixed; 3],
            acquires: 2,
            renewals: 0,
            last_tick: 4,
            min_states: 494_000,
            ..BASE
        },
        Config {
            name: "close",
            description: "sessions are closed",
            close: true,
            renewals: 1,
            give_up: false,
            last_tick: 2,
            min_states: 147_000,
            ..BASE
        },
        Config {
            name: "failover",
            description: "a store without the newest operations takes over",
            failover: true,
            calls: [2, 1, 0],
            polls: 1,
            renewals: 0,
            give_up: false,
            session_ttl: 4,
            last_tick: 2,
            min_states: 493_000,
            ..BASE
        },
        Config {
            name: "failover-detached",
            description: "failover with holds that are detached or in their grace",
            failover: true,
            detaches: true,
            polls: 1,
            renewals: 0,
            session_ttl: 3,
            last_tick: 3,
            give_up: false,
            min_states: 83_000,
            ..BASE
        },
        Config {
            name: "failover-retry",
            description: "failover with repeated acquires, some callers give up",
            failover: true,
            acquires: 2,
            polls: 1,
            renewals: 0,
            last_tick: 2,
            min_states: 614_000,
            ..BASE
        },
        Config {
            name: "open",
            description: "the request to open a session is repeated, and the session is closed",
            opens: 1,
            close: true,
            renewals: 0,
            give_up: false,
            min_states: 186_000,
            ..BASE
        },
    ]
}

/// Returns larger runs, which the tests do not check.
pub fn long() -> Vec<Config> {
    vec![
        Config {
            name: "long-two-calls-retry",
            description: "one client has two calls, repeated acquires",
            calls: [2, 1, 0],
            acquires: 2,
            renewals: 0,
            last_tick: 2,
            min_states: 11_000_000,
            ..BASE
        },
        Config {
            name: "long-retry",
            description: "repeated acquires and renewals",
            acquires: 2,
            min_states: 4_000_000,
            ..BASE
        },
        Config {
            name: "long-two-calls",
            description: "each client has two calls",
            calls: [2, 2, 0],
            renewals: 0,
            last_tick: 2,
            min_states: 14_000_000,
            ..BASE
        },
        Config {
            name: "long-force",
            description: "force-release, repeated acquires, polls and renewals",
            force_releases: 1,
            acquires: 2,
            polls: 1,
            last_tick: 2,
            give_up: false,
            min_states: 19_000_000,
            ..BASE
        },
    ]
}

/// Returns the run with this name.
pub fn by_name(name: &str) -> Option<Config> {
    all().into_iter().chain(long()).into_iter().find(|config| config.name == name)
}
