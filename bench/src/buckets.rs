//! What the BPF programs count in buckets, as histograms. See `bpf/bench.bpf.c`.

use anyhow::Result;
use hdrhistogram::Histogram;

/// Four for each power of two.
pub const BUCKETS: usize = 256;

pub type Buckets = [u64; BUCKETS];

/// The sum of what several CPUs have counted.
pub fn histogram<'a>(of_cpus: impl IntoIterator<Item = &'a Buckets>) -> Result<Histogram<u64>> {
    let mut histogram = Histogram::new(3)?;
    for counts in of_cpus {
        for (index, &count) in counts.iter().enumerate().filter(|(_, count)| **count > 0) {
            histogram.record_n(middle(index), count)?;
        }
    }
    Ok(histogram)
}

#[expect(clippy::cast_precision_loss, reason = "two digits of it are known")]
pub fn at(histogram: &Histogram<u64>, quantile: f64) -> f64 {
    histogram.value_at_quantile(quantile) as f64
}

/// The middle of a bucket: exact below 8, and to an eighth above.
fn middle(bucket: usize) -> u64 {
    let (exponent, rest) = (bucket / 4, bucket as u64 % 4);
    if exponent < 2 {
        return bucket as u64;
    }
    let step = 1 << (exponent - 2);
    (4 + rest) * step + step / 2
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_have_their_middles() {
        for (bucket, value) in [(1, 1), (3, 3), (8, 4), (11, 7), (12, 9), (13, 11), (16, 18), (40, 1152)] {
            assert_eq!(middle(bucket), value, "bucket {bucket}");
        }
    }

    #[test]
    fn cpus_are_summed_up() {
        let mut counts = [[0; BUCKETS]; 2];
        (counts[0][1], counts[1][1], counts[1][11]) = (5, 4, 1);
        let histogram = histogram(&counts).expect("small numbers");
        assert_eq!((histogram.len(), histogram.value_at_quantile(0.5), histogram.max()), (10, 1, 7));
    }
}
