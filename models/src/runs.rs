//! The runs of the protocol as it stands. Each visits all its states.

use crate::config::{BASE, Config, Term::Both, Term::Fixed, Term::Session, of};

/// All runs of the protocol as it stands.
pub fn all() -> Vec<Config> {
    vec![
        Config { floor: 297_000, ..BASE },
        Config { name: "waiter", about: "a waiter that polls", give_up: false, polls: 2, floor: 207_000, ..BASE },
        Config {
            name: "retry",
            about: "the first question is repeated",
            asks: 2,
            beats: 0,
            last_tick: 3,
            floor: 61_000,
            ..BASE
        },
        Config {
            name: "retry-poll",
            about: "repeated, and polled",
            asks: 2,
            polls: 1,
            beats: 0,
            give_up: false,
            floor: 31_000,
            ..BASE
        },
        Config { name: "ends", about: "ends are repeated", ends: 2, beats: 0, floor: 30_000, ..BASE },
        Config {
            name: "beats",
            about: "sessions of three ticks, slow beats",
            session_ttl: 3,
            last_tick: 5,
            beats: 1,
            give_up: false,
            floor: 721_000,
            ..BASE
        },
        Config { name: "blind", about: "takeover by a step of its own", blind: true, floor: 290_000, ..BASE },
        Config {
            name: "blind-poll",
            about: "the same with a waiter that polls",
            blind: true,
            give_up: false,
            polls: 1,
            last_tick: 4,
            floor: 125_000,
            ..BASE
        },
        Config {
            name: "fixed",
            about: "fixed terms, repeated and polled; sessions outlive them",
            terms: [Fixed; 3],
            asks: 2,
            polls: 1,
            beats: 0,
            give_up: false,
            session_ttl: 4,
            last_tick: 4,
            floor: 1_288_000,
            ..BASE
        },
        Config {
            name: "fixed-session",
            about: "a fixed holder, a session waiter",
            terms: [Fixed, Session, Session],
            polls: 1,
            give_up: false,
            last_tick: 4,
            floor: 241_000,
            ..BASE
        },
        Config {
            name: "extend",
            about: "fixed terms are extended",
            terms: [Fixed; 3],
            extends: 2,
            polls: 1,
            beats: 0,
            give_up: false,
            last_tick: 5,
            floor: 1_049_000,
            ..BASE
        },
        Config {
            name: "extend-shorter",
            about: "the same to a shorter term first",
            terms: [Fixed; 3],
            fixed_ttl: 3,
            extends: 2,
            extend_by: [1, 3],
            beats: 0,
            give_up: false,
            last_tick: 4,
            floor: 414_000,
            ..BASE
        },
        Config {
            name: "both",
            about: "terms that end with their session or before it",
            terms: [Both; 3],
            polls: 1,
            beats: 1,
            give_up: false,
            last_tick: 4,
            floor: 141_000,
            ..BASE
        },
        Config {
            name: "both-extend",
            about: "the same, extended to a longer and a shorter term",
            terms: [Both, Session, Session],
            extends: 2,
            extend_by: [3, 1],
            beats: 1,
            give_up: false,
            last_tick: 3,
            floor: 642_000,
            ..BASE
        },
        Config {
            name: "force",
            about: "forced release",
            forces: 1,
            last_tick: 3,
            give_up: false,
            floor: 452_000,
            ..BASE
        },
        Config {
            name: "force-retry",
            about: "forced release and repeated questions",
            forces: 1,
            asks: 2,
            polls: 1,
            last_tick: 2,
            beats: 0,
            give_up: false,
            floor: 221_000,
            ..BASE
        },
        Config {
            name: "force-fixed",
            about: "forced release of fixed terms",
            forces: 1,
            terms: [Fixed; 3],
            fixed_ttl: 3,
            last_tick: 4,
            extends: 0,
            polls: 1,
            beats: 0,
            give_up: false,
            floor: 65_000,
            ..BASE
        },
        Config {
            name: "two-calls",
            about: "two calls of one client",
            calls: [2, 1, 0],
            beats: 0,
            last_tick: 3,
            floor: 261_000,
            ..BASE
        },
        Config {
            name: "three",
            about: "three clients, of whom one beats",
            clients: 3,
            beats: 1,
            quiet: 2,
            last_tick: 3,
            give_up: false,
            floor: 126_000,
            ..BASE
        },
        Config {
            name: "room-for-two",
            about: "capacity 2, three clients",
            clients: 3,
            demands: [of(1, 2); 3],
            beats: 0,
            last_tick: 3,
            give_up: false,
            floor: 31_000,
            ..BASE
        },
        Config {
            name: "kinds",
            about: "a mutex, a reader and a permit",
            clients: 3,
            demands: [of(1, 1), of(1, 9), of(1, 2)],
            beats: 0,
            last_tick: 3,
            give_up: false,
            floor: 20_000,
            ..BASE
        },
        Config {
            name: "limits",
            about: "permits of different limits",
            clients: 3,
            demands: [of(1, 2), of(2, 3), of(1, 3)],
            beats: 0,
            last_tick: 3,
            give_up: false,
            floor: 25_000,
            ..BASE
        },
        Config {
            name: "resource",
            about: "writes to a fenced resource",
            writes: 1,
            beats: 1,
            give_up: false,
            last_tick: 4,
            floor: 301_000,
            ..BASE
        },
        Config {
            name: "forget",
            about: "records and fence counter are lost",
            forget: true,
            calls: [2, 1, 0],
            writes: 1,
            beats: 0,
            give_up: false,
            last_tick: 3,
            floor: 332_000,
            ..BASE
        },
        Config {
            name: "adopt",
            about: "two adopt one detached hold",
            adopt: true,
            terms: [Fixed; 3],
            asks: 2,
            extends: 0,
            beats: 0,
            last_tick: 4,
            fixed_ttl: 3,
            floor: 191_000,
            ..BASE
        },
        Config {
            name: "adopt-session",
            about: "two adopt one detached session hold",
            adopt: true,
            asks: 2,
            beats: 0,
            session_ttl: 3,
            last_tick: 3,
            floor: 45_000,
            ..BASE
        },
        Config {
            name: "blind-retry",
            about: "takeover by a step of its own, questions repeated",
            blind: true,
            asks: 2,
            beats: 1,
            quiet: 1,
            last_tick: 3,
            give_up: false,
            floor: 93_000,
            ..BASE
        },
        Config {
            name: "blind-force",
            about: "the same with a forced release",
            blind: true,
            forces: 1,
            asks: 2,
            polls: 1,
            beats: 0,
            give_up: false,
            last_tick: 4,
            floor: 371_000,
            ..BASE
        },
        Config {
            name: "blind-three",
            about: "takeover by a step of its own, three clients, of whom one beats",
            blind: true,
            clients: 3,
            beats: 1,
            quiet: 2,
            give_up: false,
            floor: 119_000,
            ..BASE
        },
        Config {
            name: "two-calls-retry",
            about: "two calls of one client, questions repeated, none given up",
            calls: [2, 1, 0],
            asks: 2,
            beats: 0,
            last_tick: 2,
            give_up: false,
            floor: 749_000,
            ..BASE
        },
        Config {
            name: "fixed-give-up",
            about: "fixed terms, repeated and given up",
            terms: [Fixed; 3],
            asks: 2,
            beats: 0,
            last_tick: 4,
            floor: 494_000,
            ..BASE
        },
        Config {
            name: "close",
            about: "sessions are closed",
            close: true,
            beats: 1,
            give_up: false,
            last_tick: 2,
            floor: 147_000,
            ..BASE
        },
        Config {
            name: "failover",
            about: "a store takes over that lacks the newest steps",
            failover: true,
            calls: [2, 1, 0],
            polls: 1,
            beats: 0,
            give_up: false,
            session_ttl: 4,
            last_tick: 2,
            floor: 493_000,
            ..BASE
        },
        Config {
            name: "failover-kept",
            about: "the same with holds that are detached or in their grace",
            failover: true,
            keeps: true,
            polls: 1,
            beats: 0,
            session_ttl: 3,
            last_tick: 3,
            give_up: false,
            floor: 83_000,
            ..BASE
        },
        Config {
            name: "failover-retry",
            about: "the same with repeated questions, some given up",
            failover: true,
            asks: 2,
            polls: 1,
            beats: 0,
            last_tick: 2,
            floor: 614_000,
            ..BASE
        },
        Config {
            name: "open",
            about: "the opening of a session is repeated, and the session closed",
            opens: 1,
            close: true,
            beats: 0,
            give_up: false,
            floor: 186_000,
            ..BASE
        },
    ]
}

/// Larger runs, not part of the usual test.
pub fn long() -> Vec<Config> {
    vec![
        Config {
            name: "long-two-calls-retry",
            about: "two calls of one client, questions repeated",
            calls: [2, 1, 0],
            asks: 2,
            beats: 0,
            last_tick: 2,
            floor: 11_000_000,
            ..BASE
        },
        Config { name: "long-retry", about: "repeated questions and beats", asks: 2, floor: 4_000_000, ..BASE },
        Config {
            name: "long-two-calls",
            about: "two calls of each client",
            calls: [2, 2, 0],
            beats: 0,
            last_tick: 2,
            floor: 14_000_000,
            ..BASE
        },
        Config {
            name: "long-force",
            about: "forced release, repeated, polled, with beats",
            forces: 1,
            asks: 2,
            polls: 1,
            last_tick: 2,
            give_up: false,
            floor: 19_000_000,
            ..BASE
        },
    ]
}

/// The run of this name.
pub fn by_name(name: &str) -> Option<Config> {
    all().into_iter().chain(long()).into_iter().find(|config| config.name == name)
}
