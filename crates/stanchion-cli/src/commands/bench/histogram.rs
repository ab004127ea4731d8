//! Counts times in buckets, so that a long measurement needs no more memory than a short one.

use std::time::Duration;

/// Number of buckets for each power of two: a bucket is at most 1/32 of its times wide.
const BUCKETS_PER_OCTAVE: u64 = 32;

/// Counts of times in microseconds.
#[derive(Clone, Debug, Default)]
pub(super) struct Histogram {
    /// Grows to the bucket of the longest time.
    buckets: Vec<u64>,
}

impl Histogram {
    pub(super) fn record(&mut self, span: Duration) {
        let bucket = bucket_of(u64::try_from(span.as_micros()).unwrap_or(u64::MAX));
        if self.buckets.len() <= bucket {
            self.buckets.resize(bucket + 1, 0);
        }
        self.buckets[bucket] += 1;
    }

    pub(super) fn add(&mut self, other: &Self) {
        if self.buckets.len() < other.buckets.len() {
            self.buckets.resize(other.buckets.len(), 0);
        }
        for (sum, count) in self.buckets.iter_mut().zip(&other.buckets) {
            *sum += count;
        }
    }

    pub(super) fn count(&self) -> u64 {
        self.buckets.iter().sum()
    }

    /// Returns the time in microseconds that this share of the recorded times does not exceed, or zero without times.
    pub(super) fn quantile(&self, share: f64) -> u64 {
        let rank = (self.count() as f64 * share).ceil() as u64;
        let mut seen = 0;
        let bucket = self.buckets.iter().position(|count| {
            seen += count;
            seen >= rank.max(1)
        });
        bucket.map_or(0, longest_in)
    }
}

/// Returns the bucket of a time. Times below 64 µs have one each.
fn bucket_of(micros: u64) -> usize {
    let octave = micros.max(1).ilog2().saturating_sub(BUCKETS_PER_OCTAVE.ilog2());
    let bucket = u64::from(octave) * BUCKETS_PER_OCTAVE + (micros >> octave);
    usize::try_from(bucket).unwrap_or(usize::MAX)
}

/// Returns the longest time of a bucket.
fn longest_in(bucket: usize) -> u64 {
    let bucket = bucket as u64;
    let octave = (bucket / BUCKETS_PER_OCTAVE).saturating_sub(1);
    let first = (bucket - octave * BUCKETS_PER_OCTAVE) << octave;
    first + ((1 << octave) - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_adjacent_and_narrow() {
        let mut next = 0;
        for bucket in 0..1_000 {
            let (first, last) = (next, longest_in(bucket));
            assert_eq!((bucket_of(first), bucket_of(last)), (bucket, bucket), "{first} to {last}");
            assert!(last - first <= first / 32, "{first} to {last}");
            next = last + 1;
        }
    }

    #[test]
    fn quantiles_follow_the_ranks() {
        let mut times = Histogram::default();
        assert_eq!((times.count(), times.quantile(0.5)), (0, 0));
        (1..=50).for_each(|micros| times.record(Duration::from_micros(micros)));
        let mut slow = Histogram::default();
        slow.record(Duration::from_secs(1));
        times.add(&slow);
        assert_eq!((times.count(), times.quantile(0.5)), (51, 26));
        assert!((1_000_000..1_040_000).contains(&times.quantile(0.99)));
    }
}
