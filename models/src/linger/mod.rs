//! Models holds that linger: a process keeps a hold after its use and grants it to its own calls without a request, until
//! another process wants the key. The store, its messages and its history are those of the protocol's model.
//!
//! # Included
//! - One key and a few clients with one session each. A client has a few calls that want the key, some after each other
//!   and some at the same time.
//! - `linger` marks a live hold, raises the newest fence of the key to the store's clock, and answers that fence. Or it
//!   answers that a request waits for the key, or that there is no such hold. It creates and ends nothing.
//! - A local grant needs a valid session, a lease, a fence above the last one that was used and not above the answer's,
//!   and no recall. The lease starts when the last answered `linger` was sent.
//! - One call of a client asks the store for the key, and the others wait in their process. The *asker* becomes the holder
//!   for all of them. If it gives up, fails or releases, the next waiting call takes over. Any call may give up at any
//!   moment, also while its turn is on its way to it.
//! - A recall is a push to the holder. The store sends it when a request becomes the head of the queue behind a marked hold,
//!   and with each poll of the head. An idle hold is released at once, a hold in use after its guard. The calls that waited
//!   in the process before the recall are served for at most `linger` longer. Later calls ask the store for themselves.
//! - *Plain* calls ask the store for themselves: calls without `linger`, and all calls of a key that was recalled without
//!   any use, if the run has that back-off. A grant of another token of the key ends an older hold of the process.
//! - An attempt does not wait. If the key's hold lingers, it enters the queue, which recalls the hold, and gives up soon.
//! - A guard that is lost although its session is alive, because of a missed heartbeat.
//! - Force-release, reported by push or by a renewal; the loss of all records and of the fence counter; a failover to a
//!   store that lacks the newest operations; both together; a clock of the fences that is set back.
//! - `detach` and `adopt`; repeated acquires that arrive late; repeated releases.
//!
//! # Not included
//! Clock drift: the lease is local, and no other clock is compared with it. Several keys, `check_fence`, shared holds,
//! suspend, the adaptive policy (a run decides when a client asks to linger), closing and draining, and more than two
//! requests to linger.
//!
//! # Liveness
//! `L1` and `L2` are checked with two schedules from each visited state, as in the protocol's model. In the first schedule
//! all messages in flight and **all pushes** are lost, and every client has a new call as soon as an earlier one is served;
//! the clients that linger have two, and renew their lease whenever they can. In the second schedule everything arrives.
//!
//! # Properties
//! - `K1`: No two guards are valid at once.
//! - `K2`: Each valid guard has a live record with its token and the fence of its grant in the store. `K1` and `K2` ignore
//!   holds that were force-released or whose record the store has lost.
//! - `K3`: Each fence is higher than all fences granted before, local grants included. A local grant under a hold that the
//!   store no longer has is below every grant made since.
//! - `K4`: No client keeps an idle hold after it has received the recall.
//! - `K5`: No client grants locally under a hold of which it knows that it was force-released.
//! - `K6`: No call that came after its process had received a recall is granted the key locally while a request waits for
//!   it in the store.
//! - `K7`: No guard is valid without a valid session.
//! - `K8`: No local grant is made `linger` or later after a request has entered the queue of the key, even if the recall
//!   was lost.
//! - `K9`: No client gives up a hold in use that the store has, unless it was force-released.
//! - `K10`: No client grants locally under a hold when it has received a grant of the key under a higher fence.
//! - `K11`: The calls that wait in a process are granted the key locally in the order of their arrival.
//! - `L1`: Each call that has asked is served.
//! - `L2`: Nothing stays in the store.

pub mod client;
pub mod config;
pub mod history;
pub mod liveness;
pub mod model;
pub mod mutant;
pub mod properties;
pub mod runs;
