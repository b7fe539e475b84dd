//! Who may attend to whom, as a list of query ranges.

use std::ops::Range;

/// A run of queries that see a whole prefix and, causally, a run of keys of their own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// Index of the first query.
    pub query: usize,
    /// Number of queries, and of own keys.
    pub len: usize,
    /// Index of the first key that every query sees.
    pub prefix: usize,
    /// Number of such keys; may be 0.
    pub prefix_len: usize,
    /// Index of the first own key: query `i` of the segment sees own keys `0..=i`.
    pub own: usize,
}

/// Segments of one attention call, grouped into rows that share keys.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Segments {
    segments: Vec<Segment>,
    rows: Vec<Range<usize>>,
}

impl Segments {
    /// Adds a packed row: `shared ++ tails[0] ++ tails[1] …` starting at token `start`, where each tail
    /// sees the shared part and itself, never another tail. Empty parts are skipped.
    pub fn push_row(&mut self, start: usize, shared: usize, tails: &[usize]) {
        let first = self.segments.len();
        if shared > 0 {
            self.segments.push(Segment {
                query: start,
                len: shared,
                prefix: start,
                prefix_len: 0,
                own: start,
            });
        }
        let mut at = start + shared;
        for &len in tails.iter().filter(|&&len| len > 0) {
            self.segments.push(Segment { query: at, len, prefix: start, prefix_len: shared, own: at });
            at += len;
        }
        self.rows.push(first..self.segments.len());
    }

    /// Adds one segment as a row of its own. Its keys must not be shared with another row.
    pub fn push(&mut self, segment: Segment) {
        self.rows.push(self.segments.len()..self.segments.len() + 1);
        self.segments.push(segment);
    }

    /// All segments.
    pub fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// Segments of each row; no two rows share a key.
    pub fn rows(&self) -> impl ExactSizeIterator<Item = &[Segment]> + Clone {
        self.rows.iter().map(|range| &self.segments[range.clone()])
    }

    /// True when no two segments share a query and no two rows share a key, which the kernels rely on.
    pub fn is_disjoint(&self) -> bool {
        let apart = |mut ranges: Vec<Range<usize>>| {
            ranges.retain(|range| !range.is_empty());
            ranges.sort_unstable_by_key(|range| range.start);
            ranges.windows(2).all(|pair| pair[0].end <= pair[1].start)
        };
        let queries = self.segments.iter().map(|s| s.query..s.query + s.len).collect();
        let keys = self.rows().map(|row| {
            let ends = row.iter().map(|s| (s.own + s.len).max(s.prefix + s.prefix_len)).max().unwrap_or(0);
            let first = |s: &Segment| if s.prefix_len > 0 { s.own.min(s.prefix) } else { s.own };
            row.iter().map(first).min().unwrap_or(ends)..ends
        });
        apart(queries) && apart(keys.collect())
    }

    /// One past the last query and the last key that any segment names.
    pub fn extent(&self) -> (usize, usize) {
        let queries = self.segments.iter().map(|s| s.query + s.len).max().unwrap_or(0);
        let keys =
            self.segments.iter().map(|s| (s.own + s.len).max(s.prefix + s.prefix_len)).max().unwrap_or(0);
        (queries, keys)
    }
}
