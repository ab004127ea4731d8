//! A model of stanchion's lock protocol, checked with stateright over all its states. No code of stanchion is in it:
//! it models the rules, so that a rule can be broken and the breakage seen.
//!
//! # What is modelled
//! One key, a few clients, one session each. The store does one atomic step for each request, and settles the key
//! first. Requests and answers overtake each other, come late or never; pushes come late, never, or many times. A pause
//! of a client is time that passes while it takes no step. Time is ticks of one clock that all share.
//!
//! Mutexes, readers and permits, with limits that differ. Sessions with beats and a local deadline; session and fixed terms, and those that end with either; `acquire` with
//! `not_after`, repeated with the same token; a queue; `poll`; hand-off with a push; `release` and `abandon`, repeated until
//! definite; `extend`, also to a shorter term, of which a client waits for the newest alone; forced release; takeover, in
//! the lock's own step or by a step of its own; the loss of all records of the key; a failover to a store that lacks the
//! newest steps on the key, and grants that are told again after it; the opening of a session, repeated; `adopt`; a
//! resource that checks fences.
//!
//! # What is not modelled
//! Drift and steps of clocks, failover to a store that lacks the newest beats, several keys, cooldown, limits of the
//! queue, a second session of the same client. The model has no code in common
//! with the library: that the library keeps the rules is shown elsewhere.
//!
//! # Liveness
//! `L1` to `L4` are checked by playing, from every visited state, two schedules without faults: one where everything on
//! its way is lost, one where it is delivered first. That is two schedules for each state, **not a proof in temporal
//! logic**: a livelock that needs another schedule is not seen.
//!
//! # How to run
//! `cargo test -p stanchion-models -- --nocapture` visits every run and every mutant. `cargo run -p stanchion-models --
//! list` names them; `run NAME` and `mutant NAME` do one and print the way to what breaks.
//!
//! # Properties
//! - `I1` no more believers than the key has room. `I2` who believes has a live record with its token and fence. Beliefs
//!   in a fence that was forced out, or whose record the store lost, are excused from both.
//! - `I3` no more records than the key has room: who takes all is alone, and nobody's limit is exceeded.
//! - `I4` fences strictly increase over all grants. `I5` the resource accepts nothing below what it accepted.
//! - `I7` a lost hold is never believed again. `I8` a token is granted once while its call and its session live.
//! - `I9` a dead session stays dead. `I10` what is detached or in its grace stays in the store while its session lives.
//!   `I11` nobody is granted before a call that waits longer.
//! - `L1` the key becomes free. `L2` every waiter whose session lives is served. `L3` no hold and no queue entry stays.
//!   `L4` who was forced out learns it by its next beat, if its session lives.
#![allow(clippy::unwrap_used, clippy::expect_used)]

pub mod client;
pub mod config;
pub mod history;
pub mod message;
pub mod model;
pub mod mutant;
pub mod properties;
pub mod run;
pub mod runs;
pub mod settle;
pub mod store;
