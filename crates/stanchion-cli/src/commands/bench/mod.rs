//! `bench`: measures acquires, releases and hand-offs in the user's own store.

mod histogram;
mod load;
mod progress;

use std::time::Duration;

use serde::Serialize;
use stanchion::Locks;

use self::histogram::Histogram;
use self::progress::Progress;
use crate::arguments::Bench;
use crate::exit_code;
use crate::message::{Failure, Verbosity};
use crate::output::{json_line, measured, millis, print, table};
use crate::store::{StoreChoice, close};

/// A measured step, as `--json` shows it.
#[derive(Debug, Serialize)]
struct Measurement {
    tasks: usize,
    step: &'static str,
    count: u64,
    per_second: f64,
    p50_us: u64,
    p99_us: u64,
}

impl Measurement {
    /// Returns the measurement of a step that all tasks together executed within `span`.
    fn new(tasks: usize, step: &'static str, times: &Histogram, span: Duration) -> Self {
        let count = times.count();
        // A tenth of a step in a second is exact enough.
        let per_second = (count as f64 / span.as_secs_f64() * 10.0).round() / 10.0;
        Self { tasks, step, count, per_second, p50_us: times.quantile(0.5), p99_us: times.quantile(0.99) }
    }

    fn row(&self) -> Vec<String> {
        let time = |micros| measured(Duration::from_micros(micros));
        let per_second =
            if self.per_second < 100.0 { self.per_second.to_string() } else { format!("{:.0}", self.per_second) };
        vec![
            self.tasks.to_string(),
            self.step.into(),
            self.count.to_string(),
            per_second,
            time(self.p50_us),
            time(self.p99_us),
        ]
    }
}

/// The object that `--json` prints.
#[derive(Debug, Serialize)]
struct BenchRecord<'a> {
    store: &'a str,
    for_ms: u64,
    measurements: &'a [Measurement],
}

pub(super) fn execute(bench: &Bench, store: &StoreChoice, verbosity: Verbosity) -> Result<u8, Failure> {
    store.check_exists()?;
    let progress = Progress::new(verbosity);
    let measurements = store.run(async || Ok(measure(bench, store, &progress).await))?;
    progress.clear();
    let (measurements, shown) = (measurements?, store.shown());
    let text = if bench.json {
        json_line(&BenchRecord { store: &shown, for_ms: millis(bench.length), measurements: &measurements })?
    } else {
        let rows: Vec<_> = measurements.iter().map(Measurement::row).collect();
        let table = table(&["TASKS", "STEP", "COUNT", "PER SECOND", "P50", "P99"], &rows);
        let length = crate::output::for_people(bench.length);
        format!("store {shown}; tasks of one process and one session; {length} for each measurement\n\n{table}")
    };
    print(&text)?;
    Ok(exit_code::OK)
}

async fn measure(bench: &Bench, store: &StoreChoice, progress: &Progress) -> Result<Vec<Measurement>, Failure> {
    let opened = store.open(Some(&super::owner(&["bench".into()])), None, None).await?;
    let measured = measure_all(bench, &opened.locks, progress).await;
    close(&opened, measured.as_ref().is_err_and(|failure| failure.code == exit_code::UNAVAILABLE)).await;
    measured
}

async fn measure_all(bench: &Bench, locks: &Locks, progress: &Progress) -> Result<Vec<Measurement>, Failure> {
    let key = super::own_key("bench")?;
    let mut sizes = vec![1, bench.tasks];
    sizes.dedup();
    let mut measurements = Vec::new();
    for tasks in sizes {
        let work = load::pairs(locks, &key, tasks, bench.length);
        let pairs = progress.during(&format!("acquire and release, tasks: {tasks}"), bench.length, work).await?;
        for (step, times) in [("pair", &pairs.both), ("acquire", &pairs.acquire), ("release", &pairs.release)] {
            measurements.push(Measurement::new(tasks, step, times, pairs.span));
        }
        let work = load::hand_offs(locks, &key, tasks, bench.length);
        let (times, span) = progress.during(&format!("hand-off, tasks: {tasks}"), bench.length, work).await?;
        measurements.push(Measurement::new(tasks, "hand-off", &times, span));
    }
    Ok(measurements)
}
