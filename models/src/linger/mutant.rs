//! Defines the mutants of holds that linger, each of which breaks one rule.

use crate::linger::config::{BASE, Config};
use crate::linger::runs;
use crate::mutant::{Mutant, Mutation, mutant};

fn run(name: &str) -> Config {
    runs::all().into_iter().chain(runs::long()).find(|config| config.name == name).unwrap_or(BASE)
}

/// Returns all mutants.
pub fn all() -> Vec<Mutant<Config>> {
    use Mutation::*;
    let one_fence = Config { name: "linger-force, one fence per tick", fences_per_tick: 1, ..run("linger-force") };
    let base_late = Config { name: "linger-base, four ticks", last_tick: 4, ..BASE };
    vec![
        mutant("elapsed-block", ElapsedBlock, run("linger-forget"), Some("K3")),
        mutant("whole-block", WholeBlock, run("linger-forget"), Some("K3")),
        mutant("past-block", PastBlock, run("linger-forget"), Some("K3")),
        mutant("counter-not-raised", CounterNotRaised, run("linger-set-back"), Some("K3")),
        mutant("force-forgets-counter", ForceForgetsCounter, one_fence, Some("K3")),
        mutant("same-fence", SameFence, run("linger-base"), Some("K3")),
        mutant("adopt-keeps-fence", AdoptKeepsFence, run("linger-adopt"), Some("K3")),
        mutant("linger-releases", LingerReleases, run("linger-base"), Some("K2")),
        mutant("wanted-not-reported", WantedNotReported, run("linger-base"), Some("K8")),
        mutant("no-lease", NoLease, run("linger-base"), Some("L1")),
        mutant("lease-from-reply", LeaseFromReply, base_late, Some("K8")),
        mutant("local-without-session", LocalWithoutSession, run("linger-session"), Some("K2")),
        mutant("recall-forgotten", RecallForgotten, run("linger-base"), Some("K4")),
        mutant("recall-ends-use", RecallEndsUse, run("linger-base"), Some("K2")),
        mutant("release-stays", ReleaseStays, run("linger-base"), Some("K2")),
        mutant("force-released-goes-on", ForceReleasedGoesOn, run("linger-force"), Some("K5")),
        mutant("late-comers-wait", LateComersWait, run("linger-base"), Some("K6")),
        mutant("late-answer-revives", LateAnswerRevives, run("linger-base"), Some("K2")),
        mutant("gone-ignored", GoneIgnored, run("linger-forget"), Some("K2")),
        mutant("fence-not-compared", FenceNotCompared, run("linger-failover-release"), Some("K3")),
        mutant("lineage-not-compared", LineageNotCompared, run("linger-long-force-failover"), Some("K3")),
        mutant("attempt-not-abandoned", AttemptNotAbandoned, run("linger-attempt"), Some("L2")),
        mutant("busy-is-final", BusyIsFinal, run("linger-attempt-repeated"), Some("L2")),
        mutant("asker-leaves-nobody", AskerLeavesNobody, run("linger-asker"), Some("L1")),
        mutant("release-passes-nothing-on", ReleasePassesNothingOn, run("linger-base"), Some("L1")),
        mutant("loss-passes-nothing-on", LossPassesNothingOn, run("linger-loss"), Some("L1")),
        mutant("turn-lost", TurnLost, run("linger-long-turns"), Some("L1")),
        mutant("newest-first", NewestFirst, run("linger-three"), Some("K11")),
        mutant("promise-keeps-hold", PromiseKeepsHold, run("linger-promise"), Some("K4")),
        // The lease never outlasts the promise, so the limit changes nothing.
        mutant("promise-without-limit", PromiseWithoutLimit, run("linger-base"), None),
        mutant("promise-without-lease", PromiseWithoutLease, base_late, Some("K8")),
        mutant("superseded-goes-on", SupersededGoesOn, run("linger-off-force"), Some("K10")),
        mutant("newer-superseded", NewerSuperseded, run("linger-off-force"), Some("K9")),
    ]
}
