//! Keys and values of running sequences, in pages of a cache that all of them share.

use crate::{Segment, Segments};

/// Tokens of a page.
pub const PAGE: usize = 32;

/// Queries of one sequence: consecutive tokens, the last ones of those that its pages hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Span {
    /// Index of the first query.
    pub query: usize,
    /// Number of queries; their keys and values are written into the cache.
    pub len: usize,
    /// Tokens that the cache holds already: query `i` sees `seen + i + 1` keys.
    pub seen: usize,
    /// Pages of the sequence's tokens, in order. Others may read the pages before the first query, none may hold
    /// those that are written.
    pub pages: Vec<u32>,
}

impl Span {
    /// Row of the cache that token `index` of the sequence has.
    pub(crate) fn slot(&self, index: usize) -> u32 {
        self.pages[index / PAGE] * PAGE as u32 + (index % PAGE) as u32
    }

    /// Tokens of the sequence, the queries included.
    pub fn tokens(&self) -> usize {
        self.seen + self.len
    }
}

/// Slots that queries are written to, slots of all keys that are seen, one sequence after the other, and who sees
/// which of those.
pub(crate) fn gathered(spans: &[Span]) -> (Vec<u32>, Vec<u32>, Segments) {
    let (mut writes, mut reads, mut segments) = (Vec::new(), Vec::new(), Segments::default());
    for span in spans {
        let prefix = reads.len();
        reads.extend((0..span.tokens()).map(|i| span.slot(i)));
        writes.extend((span.seen..span.tokens()).map(|i| span.slot(i)));
        let Span { query, len, seen, .. } = *span;
        segments.push(Segment { query, len, prefix, prefix_len: seen, own: prefix + seen });
    }
    (writes, reads, segments)
}

/// Errors in what a caller gives, found before a kernel relies on it.
pub(crate) fn check(spans: &[Span], queries: usize, pages: usize) {
    let mut at = 0;
    for span in spans {
        assert!(span.query == at && span.len > 0, "spans cover the queries one after the other");
        assert!(span.tokens() <= span.pages.len() * PAGE, "a span has more tokens than its pages hold");
        assert!(span.pages.iter().all(|&page| (page as usize) < pages), "a page is beyond the cache");
        at += span.len;
    }
    assert!(at == queries, "spans cover every query");
}
