//! Defines the runs of the unbroken rules. Each run visits all its states.

use crate::linger::config::{BASE, Config};

/// Returns the runs that the tests check. The long tests check those that are not short.
pub fn all() -> Vec<Config> {
    let both = [true, true, false];
    vec![
        BASE,
        Config {
            name: "linger-three",
            description: "three calls of the client that lingers",
            calls: [3, 1, 0],
            last_tick: 2,
            min_states: 36_000,
            ..BASE
        },
        Config {
            name: "linger-waiter",
            description: "requests poll, and calls give up",
            polls: 1,
            give_up: true,
            last_tick: 2,
            min_states: 500_000,
            ..BASE
        },
        Config {
            name: "linger-asks",
            description: "the client asks twice to linger",
            asks: 2,
            min_states: 135_000,
            ..BASE
        },
        Config {
            name: "linger-both",
            description: "two clients that linger, with two calls each",
            lingers: both,
            calls: [2, 2, 0],
            last_tick: 2,
            min_states: 160_000,
            ..BASE
        },
        Config {
            name: "linger-repeated-releases",
            description: "releases are repeated",
            releases: 1,
            last_tick: 2,
            min_states: 45_000,
            ..BASE
        },
        Config {
            name: "linger-session",
            description: "sessions expire, and each client renews once",
            session_ttl: 2,
            linger: 4,
            last_tick: 4,
            renewals: [1, 1, 0],
            min_states: 750_000,
            ..BASE
        },
        Config {
            name: "linger-force",
            description: "force-release, reported by push",
            force_releases: 1,
            last_tick: 2,
            min_states: 87_000,
            ..BASE
        },
        Config {
            name: "linger-force-renewal",
            description: "force-release, reported by a renewal",
            force_releases: 1,
            pushes_force_releases: false,
            renewals: [1, 0, 0],
            last_tick: 2,
            min_states: 360_000,
            ..BASE
        },
        Config {
            name: "linger-forget",
            description: "the store loses its records and fence counter",
            forget: true,
            linger: 3,
            min_states: 88_000,
            ..BASE
        },
        Config {
            name: "linger-forget-both",
            description: "the same with two clients that linger",
            lingers: both,
            forget: true,
            linger: 3,
            min_states: 260_000,
            ..BASE
        },
        Config {
            name: "linger-failover",
            description: "a store without the newest operations takes over",
            failover: true,
            linger: 3,
            min_states: 500_000,
            ..BASE
        },
        Config {
            name: "linger-failover-release",
            description: "failover with repeated releases",
            failover: true,
            linger: 3,
            releases: 1,
            fences_per_tick: 2,
            last_tick: 2,
            min_states: 690_000,
            ..BASE
        },
        Config {
            name: "linger-set-back",
            description: "the clock of the fences is set back",
            set_back: true,
            last_tick: 2,
            min_states: 21_000,
            ..BASE
        },
        Config {
            name: "linger-adopt",
            description: "a hold that lingered is detached and adopted",
            adopt: true,
            calls: [3, 1, 0],
            min_states: 36_000,
            ..BASE
        },
        Config {
            name: "linger-repeated",
            description: "acquires are repeated and may arrive late",
            repeats: true,
            last_tick: 2,
            min_states: 290_000,
            ..BASE
        },
        Config {
            name: "linger-attempt",
            description: "an attempt elsewhere recalls a lingering hold and gives up",
            calls: [2, 0, 0],
            attempts: [0, 1, 0],
            min_states: 67_000,
            ..BASE
        },
        Config {
            name: "linger-attempt-repeated",
            description: "an attempt whose requests are repeated and may arrive late",
            calls: [1, 0, 0],
            attempts: [0, 1, 0],
            repeats: true,
            min_states: 370_000,
            ..BASE
        },
        Config {
            name: "linger-asker",
            description: "three calls of one process, any of which gives up; one of them asks",
            calls: [3, 1, 0],
            give_up: true,
            last_tick: 1,
            asks: 0,
            min_states: 150_000,
            ..BASE
        },
        Config {
            name: "linger-turns",
            description: "turns take time and calls give up while they wait for one",
            calls: [2, 1, 0],
            give_up: true,
            slow_turns: true,
            last_tick: 2,
            min_states: 215_000,
            ..BASE
        },
        Config {
            name: "linger-loss",
            description: "guards miss their heartbeat",
            calls: [3, 1, 0],
            losses: true,
            last_tick: 2,
            min_states: 36_000,
            ..BASE
        },
        Config {
            name: "linger-three-clients",
            description: "three clients with a call each, two of which linger",
            clients: 3,
            lingers: both,
            calls: [1, 1, 1],
            last_tick: 2,
            min_states: 28_000,
            ..BASE
        },
        Config {
            name: "linger-off",
            description: "plain calls beside calls that linger, and a back-off",
            calls: [2, 0, 0],
            plain: [1, 0, 0],
            attempts: [0; 3],
            clients: 1,
            backs_off: true,
            min_states: 61_000,
            ..BASE
        },
        Config {
            name: "linger-off-force",
            description: "plain calls beside calls that linger, with a force-release",
            calls: [2, 0, 0],
            plain: [1, 0, 0],
            clients: 1,
            force_releases: 1,
            min_states: 1_000_000,
            ..BASE
        },
        Config {
            name: "linger-promise",
            description: "the lease ends before the promise of calls that wait",
            calls: [3, 1, 0],
            linger: 3,
            last_tick: 4,
            session_ttl: 6,
            min_states: 650_000,
            ..BASE
        },
        Config {
            name: "linger-force-failover",
            description: "a failover undoes a force-release",
            force_releases: 1,
            failover: true,
            linger: 3,
            calls: [2, 1, 0],
            last_tick: 2,
            compares_lineage: true,
            min_states: 1_500_000,
            ..BASE
        },
    ]
}

/// Returns larger runs, which the tests do not check.
pub fn long() -> Vec<Config> {
    let both = [true, true, false];
    vec![
        Config {
            name: "linger-long-force",
            description: "force-release, three calls",
            calls: [3, 1, 0],
            force_releases: 1,
            fences_per_tick: 2,
            last_tick: 2,
            ..BASE
        },
        Config {
            name: "linger-long-forget",
            description: "the store loses its records, two clients that linger, with two calls each",
            lingers: both,
            calls: [2, 2, 0],
            forget: true,
            linger: 3,
            last_tick: 2,
            ..BASE
        },
        Config {
            name: "linger-long-failover",
            description: "failover, two calls each, polls",
            calls: [2, 2, 0],
            failover: true,
            polls: 1,
            last_tick: 2,
            ..BASE
        },
        Config {
            name: "linger-long",
            description: "three calls, two requests to linger, polls",
            calls: [3, 1, 0],
            asks: 2,
            polls: 1,
            ..BASE
        },
        Config {
            name: "linger-long-force-failover",
            description: "a failover undoes a force-release, three calls",
            force_releases: 1,
            failover: true,
            linger: 3,
            calls: [3, 1, 0],
            last_tick: 2,
            compares_lineage: true,
            ..BASE
        },
        Config {
            name: "linger-long-attempts",
            description: "both clients have an attempt and linger",
            lingers: both,
            calls: [1, 1, 0],
            attempts: [1, 1, 0],
            last_tick: 2,
            ..BASE
        },
        Config {
            name: "linger-long-turns",
            description: "turns take time and calls give up while they wait for one",
            calls: [3, 1, 0],
            give_up: true,
            slow_turns: true,
            last_tick: 2,
            ..BASE
        },
    ]
}
