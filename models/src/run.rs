//! Checks one run by visiting all states within its bounds.

use std::collections::BTreeSet;
use std::fmt::{self, Debug};
use std::hash::Hash;
use std::time::{Duration, Instant};

use stateright::{Checker, HasDiscoveries, Model};

use crate::config::Config;
use crate::model::Protocol;
use crate::mutant::{Mutant, Mutation};

/// Bounds of a run, from which its model is made.
pub trait Bounds: Copy {
    /// The model within these bounds.
    type Bounded: Model<State: Clone + Debug + Hash + PartialEq + Send + Sync, Action: Clone + Debug + PartialEq>
        + Send
        + Sync
        + 'static;

    /// Returns the name of the run.
    fn name(&self) -> &'static str;

    /// Returns the behaviour that the run explores.
    fn description(&self) -> &'static str;

    /// Returns the minimum number of unique states.
    fn min_states(&self) -> usize;

    /// Returns the model, in which a mutant breaks one rule.
    fn model(self, broken: Option<Mutation>) -> Self::Bounded;
}

impl Bounds for Config {
    type Bounded = Protocol;

    fn name(&self) -> &'static str {
        self.name
    }

    fn description(&self) -> &'static str {
        self.description
    }

    fn min_states(&self) -> usize {
        self.min_states
    }

    fn model(self, broken: Option<Mutation>) -> Protocol {
        Protocol { config: self, broken }
    }
}

/// Result of a run.
#[derive(Clone, Debug)]
pub struct Report {
    /// Name of the run or mutant.
    pub name: &'static str,
    /// Name of the bounds.
    pub config: &'static str,
    /// Number of unique states.
    pub states: usize,
    /// Wall time of the run.
    pub duration: Duration,
    /// Length of the longest path that the search followed.
    pub depth: usize,
    /// Whether every state within the bounds was visited.
    pub complete: bool,
    /// Events that this run reached.
    pub reached: Vec<&'static str>,
    /// Broken properties with the trace to each.
    pub broken: Vec<(&'static str, Vec<String>)>,
}

impl Report {
    /// Returns the trace to a broken property.
    pub fn trace(&self, property: &str) -> Option<&[String]> {
        self.broken.iter().find(|(name, _)| *name == property).map(|(_, trace)| trace.as_slice())
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:26} {:22} {:9} states {:6.2} s depth {:3}",
            self.name,
            self.config,
            self.states,
            self.duration.as_secs_f64(),
            self.depth
        )?;
        if self.broken.is_empty() {
            return write!(f, " {}", if self.complete { "holds" } else { "cut, nothing found" });
        }
        for (name, trace) in &self.broken {
            write!(f, " {name}({})", trace.len())?;
        }
        Ok(())
    }
}

/// Limits of a search.
struct Limits {
    threads: usize,
    until: HasDiscoveries,
    /// Time after which the search is cut.
    time: Option<Duration>,
}

// The clock measures only how long a run takes; nothing in the model depends on it.
#[allow(clippy::disallowed_methods)]
fn search<B: Bounds>(name: &'static str, bounds: B, broken: Option<Mutation>, limits: Limits) -> Report {
    let began = Instant::now();
    let mut builder = bounds.model(broken).checker().threads(limits.threads).finish_when(limits.until);
    if let Some(time) = limits.time {
        builder = builder.timeout(time);
    }
    let checker = builder.spawn_bfs().join();
    let in_time = limits.time.is_none_or(|time| began.elapsed() < time);
    let steps = |action: &<B::Bounded as Model>::Action| format!("{action:?}");
    let mut found: Vec<(&'static str, Vec<String>)> = checker
        .discoveries()
        .into_iter()
        .map(|(name, trace)| (name, trace.into_actions().iter().map(steps).collect()))
        .collect();
    found.sort_unstable_by_key(|(name, _)| *name);
    let sometimes = |name: &str| name.contains(' ');
    let reached = found.iter().map(|(name, _)| *name).filter(|name| sometimes(name)).collect();
    found.retain(|(name, _)| !sometimes(name));
    Report {
        name,
        config: bounds.name(),
        complete: in_time && checker.is_done() && found.is_empty(),
        reached,
        states: checker.unique_state_count(),
        duration: began.elapsed(),
        depth: checker.max_depth(),
        broken: found,
    }
}

/// Checks the unbroken rules by visiting every state within these bounds, and stops early only if a property fails.
pub fn run<B: Bounds>(bounds: B) -> Report {
    run_for(bounds, None)
}

/// Does the same as [`run`], and cuts the search after a time.
pub fn run_for<B: Bounds>(bounds: B, time: Option<Duration>) -> Report {
    search(bounds.name(), bounds, None, Limits { threads: 2, until: HasDiscoveries::AnyFailures, time })
}

/// Checks a mutant until its property fails. A breadth-first search with one thread finds a shortest trace.
pub fn run_mutant<B: Bounds>(mutant: Mutant<B>) -> Report {
    let until = match mutant.killed_by {
        Some(property) => HasDiscoveries::AnyOf(BTreeSet::from([property])),
        None => HasDiscoveries::All,
    };
    search(mutant.name, mutant.config, Some(mutant.broken), Limits { threads: 1, until, time: None })
}
