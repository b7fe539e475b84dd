//! Recorded replies in place of a server.
//!
//! A line holds `task` and `student_solution` (or `prompt` and `answer`, or `id`) and the raw chat
//! completion in `response`.

use std::sync::Arc;

use std::collections::HashMap;
use std::path::Path;

use anyhow::{Result, bail};
use chat_client::Reply;
use pref_data::read_jsonl;
use serde_json::Value;

use crate::asker::Spent;
use crate::input::Answer;
use crate::methods::Row;
use crate::output::{Failed, Pair};
use crate::parse::checks::Around;
use crate::parse::{self, Form};

/// Recorded replies by task and answer, and by id.
#[derive(Debug, Default)]
pub struct Replay {
    by_text: HashMap<(String, String), Reply>,
    by_id: HashMap<String, Reply>,
}

impl Replay {
    /// Reads a file of recorded replies.
    pub fn read(path: &Path) -> Result<Self> {
        let mut replay = Self::default();
        for (line, row) in read_jsonl(path)? {
            let reply = Reply::parse(row["response"].to_string().as_bytes()).map_err(|reason| {
                anyhow::anyhow!("{}:{line}: column \"response\": {reason}", path.display())
            })?;
            let text =
                |names: [&str; 2]| names.iter().find_map(|&name| row[name].as_str()).map(str::to_owned);
            let (task, answer) = (text(["task", "prompt"]), text(["student_solution", "answer"]));
            let id = match &row["id"] {
                Value::Null => None,
                Value::String(id) => Some(id.clone()),
                other => Some(other.to_string()),
            };
            match (task, answer, id) {
                (Some(task), Some(answer), _) => drop(replay.by_text.insert((task, answer), reply)),
                (_, _, Some(id)) => drop(replay.by_id.insert(id, reply)),
                _ => bail!("{}:{line}: needs task and student_solution, or id", path.display()),
            }
        }
        Ok(replay)
    }

    /// The recorded reply to an answer.
    pub fn get(&self, answer: &Answer) -> Option<&Reply> {
        let text = (answer.prompt(), answer.response().to_string());
        self.by_text.get(&text).or_else(|| self.by_id.get(&answer.id))
    }

    /// The pair that the recorded reply gives.
    pub fn row(&self, answer: Arc<Answer>, spent: &mut Spent) -> Row {
        let failed = |reason: &str, attempts: u32, last: String| {
            let (id, reason) = (answer.id.clone(), reason.into());
            Row::Failed(Failed { id, reason, attempts, last_error: last })
        };
        let Some(reply) = self.get(&answer) else {
            let last = "the replay file holds no reply to this prompt and answer";
            return failed("not_recorded", 0, last.into());
        };
        spent.usage += reply.usage();
        let prompt = answer.prompt();
        let around = Around { prompt: &prompt, answer: answer.response() };
        match parse::revision(reply, Form::Markers, around) {
            Ok(revision) => {
                let rejected = answer.response().to_string();
                let pair = Pair::new(answer, revision.text, rejected, *spent).finished(reply);
                Row::Pair(Box::new(Pair { rational: revision.reasoning, ..pair }))
            }
            Err(reason) => failed(reason.name(), 1, reply.content().chars().take(200).collect()),
        }
    }
}
