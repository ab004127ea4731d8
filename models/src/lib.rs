//! Models stanchion's lock protocol and checks all its states with stateright. It contains no code of stanchion. It
//! models the rules, so that a mutant can break one rule and a property shows the damage.
//!
//! # Included
//! - One key and a few clients with one session each.
//! - The store runs one atomic operation per request and first reconciles the key: it expires holds and waiters whose
//!   time is over, and then grants to the queue.
//! - Requests and responses overtake each other, arrive late or get lost. Pushes arrive late, never or several times.
//! - A client pauses whenever time passes without any action of the client. All clocks show the same time, in ticks.
//! - Mutexes, readers and permits with different capacities.
//! - Sessions with renewals and a local deadline; repeated requests to open a session.
//! - Lifetimes that are bound to the session, fixed, or both.
//! - `acquire` with `not_after`, repeated with the same token; a queue; `poll`; hand-off with a push.
//! - `release` and `abandon`, repeated until their result is final.
//! - `extend`, also to a shorter lifetime. A client waits only for the newest extension.
//! - Force-release, and `adopt`.
//! - Expiry of an expired session's holds, in the operation on the key or in a separate one.
//! - The loss of all records of the key, and a failover to a store that lacks the newest operations on the key. After a
//!   failover the store repeats its grants.
//! - A resource that checks fences.
//!
//! # Not included
//! Clock drift and clock jumps, failover to a store that lacks the newest renewals, several keys, cooldown, queue
//! limits, and a second session of the same client. Because the model shares no code with the library, it cannot show
//! that the library follows the rules; other tests do.
//!
//! # Liveness
//! `L1` to `L4` are checked by playing two schedules without faults from each visited state: in one all messages in
//! flight are lost, in the other they are delivered first. These are two schedules per state and **not a proof in
//! temporal logic**: a livelock that needs another schedule is not found.
//!
//! # How to run
//! `cargo test -p stanchion-models -- --nocapture` checks all runs and mutants. `cargo run -p stanchion-models -- list`
//! lists their names. `run NAME` and `mutant NAME` check one of them and print the trace to each broken property.
//!
//! # Properties
//! A hold is *valid* if its client relies on it.
//! - `I1`: The valid holds fit into the key together.
//! - `I2`: Each valid hold has a record with its token and fence that has not expired. `I1` and `I2` ignore holds that
//!   were force-released or whose record the store has lost.
//! - `I3`: The records fit into the key together: an exclusive hold is alone, and no hold's capacity is exceeded.
//! - `I4`: Fences strictly increase over all grants.
//! - `I5`: The resource accepts no fence below an earlier one.
//! - `I7`: A lost hold never becomes valid again.
//! - `I8`: A token is granted once while its call and its session are alive.
//! - `I9`: An expired session stays expired.
//! - `I10`: A hold that is detached or in its grace stays in the store while its session is alive.
//! - `I11`: No call is granted before another call that has queued earlier.
//! - `L1`: The key becomes free.
//! - `L2`: Each waiter with a live session is served.
//! - `L3`: No hold and no queue entry stays forever.
//! - `L4`: A holder learns of a force-release at its next renewal, if its session is alive.
#![allow(clippy::unwrap_used, clippy::expect_used)]

pub mod client;
pub mod config;
pub mod history;
pub mod linger;
pub mod liveness;
pub mod message;
pub mod model;
pub mod mutant;
pub mod properties;
pub mod run;
pub mod runs;
pub mod store;
