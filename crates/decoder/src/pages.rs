//! Pages of the cache: who holds which, and which hold the beginning of other prompts too.

use std::collections::{HashMap, VecDeque};

use fused_ops::PAGE;

/// What a page holds, where it may be shared: the tokens of a full page of a prompt after those of `parent`, the
/// number of the content before it (0 at the beginning).
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Content {
    parent: u64,
    tokens: [u32; PAGE],
}

#[derive(Debug, Default)]
struct Page {
    holders: usize,
    content: Option<Content>,
    /// Number of what it holds. A page is used again for something else, a number never.
    number: u64,
    /// Its keys and values are there.
    ready: bool,
}

/// What a new sequence was given.
#[derive(Debug, PartialEq, Eq)]
pub struct Room {
    /// Its pages, in order.
    pub pages: Vec<u32>,
    /// Tokens of the prompt that other sequences have left in the first of them.
    pub shared: usize,
}

/// Why there is no room.
#[derive(Debug, PartialEq, Eq)]
pub enum Full {
    /// Other sequences have to end first.
    NoPages,
    /// Another sequence is about to compute a page that this one begins with.
    Soon,
}

/// All pages of a cache.
#[derive(Debug)]
pub struct Pages {
    all: Vec<Page>,
    /// Pages that nobody holds and nobody will look for.
    free: Vec<u32>,
    /// Pages that nobody holds but that may be found again, the longest unused first.
    kept: VecDeque<u32>,
    known: HashMap<Content, u32>,
    last: u64,
    sharing: bool,
}

impl Pages {
    /// So many pages; `sharing` lets prompts with the same beginning use the same pages.
    pub fn new(count: usize, sharing: bool) -> Self {
        let all = (0..count).map(|_| Page::default()).collect();
        let free = (0..count as u32).rev().collect();
        Self { all, free, kept: VecDeque::new(), known: HashMap::new(), last: 0, sharing }
    }

    /// Room for a prompt and what is to come after it, `tokens` in all.
    pub fn take(&mut self, prompt: &[u32], tokens: usize) -> Result<Room, Full> {
        // The last token is always computed: its logits are wanted.
        let (chunks, _) = prompt[..prompt.len() - 1].as_chunks::<PAGE>();
        let mut pages = Vec::new();
        if self.sharing {
            for chunk in chunks {
                let content = Content { parent: self.number(&pages), tokens: *chunk };
                match self.known.get(&content) {
                    Some(&page) if self.all[page as usize].ready => pages.push(page),
                    Some(_) => return Err(Full::Soon),
                    None => break,
                }
            }
        }
        let unheld = pages.iter().filter(|&&page| self.all[page as usize].holders == 0).count();
        let (shared, all) = (pages.len(), tokens.div_ceil(PAGE));
        if self.free.len() + self.kept.len() < all - shared + unheld {
            return Err(Full::NoPages);
        }
        for &page in &pages {
            self.hold(page);
        }
        for i in shared..all {
            let page = self.fresh();
            if let Some(chunk) = chunks.get(i).filter(|_| self.sharing) {
                let content = Content { parent: self.number(&pages), tokens: *chunk };
                self.known.insert(content.clone(), page);
                self.all[page as usize].content = Some(content);
            }
            pages.push(page);
        }
        Ok(Room { pages, shared: shared * PAGE })
    }

    /// Number of what the last of these pages holds.
    fn number(&self, pages: &[u32]) -> u64 {
        pages.last().map_or(0, |&page| self.all[page as usize].number)
    }

    fn hold(&mut self, page: u32) {
        let entry = &mut self.all[page as usize];
        if entry.holders == 0 {
            self.kept.retain(|&kept| kept != page);
        }
        entry.holders += 1;
    }

    /// An unused page, the longest unused one of those that could be found again where there is no other.
    fn fresh(&mut self) -> u32 {
        let page = self.free.pop().or_else(|| {
            let page = self.kept.pop_front()?;
            self.forget(page);
            Some(page)
        });
        let page = page.expect("counted before");
        self.last += 1;
        self.all[page as usize] = Page { holders: 1, content: None, number: self.last, ready: false };
        page
    }

    /// Pages after this one can then not be found any more either; they grow old by themselves.
    fn forget(&mut self, page: u32) {
        if let Some(content) = self.all[page as usize].content.take() {
            self.known.remove(&content);
        }
    }

    /// The first `tokens` tokens of a sequence are in its pages now.
    pub fn computed(&mut self, pages: &[u32], tokens: usize) {
        for &page in &pages[..tokens / PAGE] {
            self.all[page as usize].ready = true;
        }
    }

    /// A sequence ended.
    pub fn give_back(&mut self, pages: &[u32]) {
        // The end of a prompt is looked for less often than its beginning: it goes first.
        for &page in pages.iter().rev() {
            let entry = &mut self.all[page as usize];
            entry.holders -= 1;
            if entry.holders > 0 {
                continue;
            }
            if entry.ready && entry.content.is_some() {
                self.kept.push_back(page);
            } else {
                self.forget(page);
                self.free.push(page);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prompt(shared: usize, own: u32, len: usize) -> Vec<u32> {
        (0..len as u32).map(|i| if (i as usize) < shared { i } else { 1000 * own + i }).collect()
    }

    #[test]
    fn prompts_with_the_same_beginning_share_its_pages() {
        let mut pages = Pages::new(20, true);
        let first = pages.take(&prompt(70, 1, 100), 120).unwrap();
        assert_eq!((first.pages.len(), first.shared), (4, 0));
        // Nothing is there yet: the second waits for what the first is about to compute.
        assert_eq!(pages.take(&prompt(70, 2, 100), 120), Err(Full::Soon));
        pages.computed(&first.pages, 100);
        let second = pages.take(&prompt(70, 2, 100), 120).unwrap();
        assert_eq!((second.shared, &second.pages[..2]), (64, &first.pages[..2]));
        assert!(second.pages[2..].iter().all(|page| !first.pages.contains(page)));
        // What nobody holds any more is still found,
        pages.give_back(&first.pages);
        pages.give_back(&second.pages);
        let third = pages.take(&prompt(70, 1, 100), 120).unwrap();
        assert_eq!((third.shared, &third.pages[..3]), (96, &first.pages[..3]));
        pages.give_back(&third.pages);
        // until its room is needed.
        let large = pages.take(&prompt(0, 7, 10), 20 * PAGE).unwrap();
        assert_eq!(large.pages.len(), 20);
        pages.give_back(&large.pages);
        assert_eq!(pages.take(&prompt(70, 1, 100), 120).unwrap().shared, 0);
    }

    #[test]
    fn a_prompt_that_is_whole_pages_still_computes_its_last_token() {
        let mut pages = Pages::new(8, true);
        let first = pages.take(&prompt(64, 1, 64), 70).unwrap();
        pages.computed(&first.pages, 64);
        assert_eq!(pages.take(&prompt(64, 1, 64), 70).unwrap().shared, 32);
    }

    #[test]
    fn room_is_counted_and_comes_back() {
        let mut pages = Pages::new(4, false);
        let first = pages.take(&prompt(64, 1, 64), 96).unwrap();
        assert_eq!(pages.take(&prompt(64, 1, 64), 96), Err(Full::NoPages));
        pages.computed(&first.pages, 64);
        pages.give_back(&first.pages);
        assert_eq!(
            pages.take(&prompt(64, 1, 64), 96).unwrap().shared,
            0,
            "nothing is shared unless asked for"
        );
    }

    #[test]
    fn pages_that_were_never_computed_are_not_found() {
        let mut pages = Pages::new(4, true);
        let first = pages.take(&prompt(64, 1, 70), 96).unwrap();
        pages.give_back(&first.pages);
        assert_eq!(pages.take(&prompt(64, 1, 70), 96).unwrap().shared, 0);
    }
}
