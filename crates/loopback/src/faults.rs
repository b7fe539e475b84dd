//! Ways in which requests fail.

/// A fault in place of a reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// 429 with a time to wait.
    Rate,
    /// 500.
    Error,
    /// 503.
    Unavailable,
    /// 529.
    Overloaded,
    /// The connection ends within the body.
    Cut,
    /// The body ends within the JSON.
    Truncated,
    /// A page of a gateway, with status 200.
    Html,
    /// A reply that keeps to no form.
    NoMarker,
    /// A reply cut off by its token limit.
    Length,
    /// Nothing comes for a minute.
    Stall,
}

impl Fault {
    /// All ten.
    pub const ALL: [Self; 10] = [
        Self::Rate,
        Self::Error,
        Self::Unavailable,
        Self::Overloaded,
        Self::Cut,
        Self::Truncated,
        Self::Html,
        Self::NoMarker,
        Self::Length,
        Self::Stall,
    ];

    /// Name in the counts.
    pub fn name(self) -> &'static str {
        match self {
            Self::Rate => "rate",
            Self::Error => "error",
            Self::Unavailable => "unavailable",
            Self::Overloaded => "overloaded",
            Self::Cut => "cut",
            Self::Truncated => "truncated",
            Self::Html => "html",
            Self::NoMarker => "no_marker",
            Self::Length => "length",
            Self::Stall => "stall",
        }
    }

    /// The fault of the request with this number, if it has one: each kind in turn, spread evenly.
    pub fn of(number: usize, share: f64) -> Option<Self> {
        let before = (number as f64 * share) as usize;
        let after = ((number + 1) as f64 * share) as usize;
        (after > before).then(|| Self::ALL[before % Self::ALL.len()])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_come_in_their_share_and_in_turn() {
        let faults: Vec<Fault> = (0..1000).filter_map(|number| Fault::of(number, 0.2)).collect();
        assert_eq!((faults.len(), &faults[..10]), (200, &Fault::ALL[..]));
        assert_eq!(Fault::of(7, 0.0), None);
    }
}
