//! Two who do something at once, and what comes when nobody waits for it any more.

use std::time::Duration;

use stanchion::store::{
    AcquireOutcome, AcquireRequest, AdoptOutcome, AdoptRequest, BeatOutcome, Demand, EndOutcome, Firestore,
    OpenOutcome, OpenSession, PollOutcome, Term,
};
use stanchion::{ErrorKind, SessionId, Store as _, TokenId, VirtualClock};
use stanchion_testkit::servers::{CommitFault, FirestoreFake};
use stanchion_testkit::{block_on, until};
use tonic::Code;

use super::{Client, MINUTE, SHORT, key};

/// What is tried once, and waits for nothing.
fn at_once(request: AcquireRequest) -> AcquireRequest {
    AcquireRequest { enqueue: false, ..request }
}

/// What was known of a session a moment ago says until when it lives, not that it is dead after that.
#[test]
fn a_session_that_was_beaten_since_it_was_looked_at_lives() {
    let fake = FirestoreFake::start();
    block_on(async {
        let url = fake.url();
        let time = VirtualClock::new();
        let holder = Client::open(&url, MINUTE).await;
        let other = Client::with(Firestore::with_clock(&url, time.clock()).unwrap(), 60 * MINUTE).await;
        holder.gets(&holder.request("k")).await;
        let try_it = || at_once(AcquireRequest { not_after: holder.opened.after(60 * MINUTE), ..other.request("k") });
        for seconds in [50, 100, 150] {
            fake.set_clock_off_by(seconds);
            let beaten = holder.store.beat(holder.session).await.unwrap().outcome;
            assert_eq!(beaten, BeatOutcome::Alive { lost: vec![] });
            // Later than the beat before this one was good for, and within a moment of the other's own clock.
            fake.set_clock_off_by(seconds + 30);
            let asked = other.asks(&try_it()).await;
            assert!(matches!(asked, AcquireOutcome::Busy { .. }), "after {seconds} s: {asked:?}");
        }
    });
}
