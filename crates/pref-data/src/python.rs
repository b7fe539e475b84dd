//! Values as Python writes them: what `str`, `repr` and `json.dumps` print in a chat template.

use std::fmt::Write as _;

use minijinja::value::{Value as Jinja, ValueKind};
use serde_json::Value;
use serde_json::ser::Formatter;

/// `str(value)`: what `{{ value }}` prints in Jinja2. Undefined prints nothing.
pub(crate) fn text(value: &Jinja) -> String {
    match value.kind() {
        ValueKind::Undefined => String::new(),
        ValueKind::String => value.as_str().unwrap_or_default().to_string(),
        _ => {
            let mut out = String::new();
            repr(value, &mut out);
            out
        }
    }
}

/// `repr(value)`.
fn repr(value: &Jinja, out: &mut String) {
    match value.kind() {
        ValueKind::None => out.push_str("None"),
        ValueKind::Bool => out.push_str(if value.is_true() { "True" } else { "False" }),
        ValueKind::Number if value.is_integer() => {
            let _ = write!(out, "{value}");
        }
        ValueKind::Number => {
            let number = f64::try_from(value.clone()).unwrap_or(f64::NAN);
            out.push_str(&float(number));
        }
        ValueKind::String => quote(value.as_str().unwrap_or_default(), out),
        ValueKind::Seq => items(value, "[", "]", out, repr),
        ValueKind::Map => items(value, "{", "}", out, |key, out| {
            repr(key, out);
            out.push_str(": ");
            repr(&value.get_item(key).unwrap_or_default(), out);
        }),
        _ => {
            let _ = write!(out, "{value}");
        }
    }
}

fn items(
    value: &Jinja,
    open: &str,
    close: &str,
    out: &mut String,
    mut each: impl FnMut(&Jinja, &mut String),
) {
    out.push_str(open);
    for (i, item) in value.try_iter().into_iter().flatten().enumerate() {
        if i > 0 {
            out.push_str(", ");
        }
        each(&item, out);
    }
    out.push_str(close);
}

/// A string literal: single quotes unless it holds one and no double quote.
fn quote(text: &str, out: &mut String) {
    let mark = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    out.push(mark);
    for c in text.chars() {
        match c {
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\\' => out.push_str("\\\\"),
            c if c == mark => {
                out.push('\\');
                out.push(c);
            }
            c if c.is_control() || (c.is_whitespace() && c != ' ') => {
                let _ = match c as u32 {
                    n @ 0..0x100 => write!(out, "\\x{n:02x}"),
                    n @ 0x100..0x1_0000 => write!(out, "\\u{n:04x}"),
                    n => write!(out, "\\U{n:08x}"),
                };
            }
            c => out.push(c),
        }
    }
    out.push(mark);
}

/// `repr` of a float: the shortest digits, an exponent below 1e-4 and from 1e16 on.
pub(crate) fn float(number: f64) -> String {
    if number.is_nan() {
        return "nan".into();
    }
    if number.is_infinite() {
        return if number > 0.0 { "inf" } else { "-inf" }.into();
    }
    let size = number.abs();
    if size != 0.0 && !(1e-4..1e16).contains(&size) {
        let text = format!("{number:e}");
        let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
        let exponent: i32 = exponent.parse().unwrap_or(0);
        let sign = if exponent < 0 { '-' } else { '+' };
        return format!("{digits}e{sign}{:02}", exponent.abs());
    }
    format!("{number:?}")
}

/// `str.isspace` for one character: Unicode white space and the four ASCII separators.
pub(crate) fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}

/// Options of `json.dumps` that chat templates use.
#[derive(Debug, Clone, Default)]
pub(crate) struct Dumps {
    pub ensure_ascii: bool,
    pub indent: Option<usize>,
    pub item_separator: Option<String>,
    pub key_separator: Option<String>,
    pub sort_keys: bool,
}

impl Dumps {
    /// `json.dumps(value, …)`.
    pub fn run(&self, mut value: Value) -> Result<String, serde_json::Error> {
        if self.sort_keys {
            value.sort_all_objects();
        }
        let comma = if self.indent.is_some() { "," } else { ", " };
        let format = Python {
            indent: self.indent,
            depth: 0,
            item: self.item_separator.as_deref().unwrap_or(comma),
            key: self.key_separator.as_deref().unwrap_or(": "),
            filled: false,
            ensure_ascii: self.ensure_ascii,
        };
        let mut out = Vec::new();
        serde::Serialize::serialize(&value, &mut serde_json::Serializer::with_formatter(&mut out, format))?;
        Ok(String::from_utf8_lossy(&out).into_owned())
    }
}

struct Python<'a> {
    indent: Option<usize>,
    depth: usize,
    item: &'a str,
    key: &'a str,
    filled: bool,
    ensure_ascii: bool,
}

impl Python<'_> {
    fn open<W: ?Sized + std::io::Write>(&mut self, w: &mut W, mark: &[u8]) -> std::io::Result<()> {
        self.depth += 1;
        self.filled = false;
        w.write_all(mark)
    }

    fn close<W: ?Sized + std::io::Write>(&mut self, w: &mut W, mark: &[u8]) -> std::io::Result<()> {
        self.depth -= 1;
        if self.filled {
            self.line(w)?;
        }
        self.filled = true;
        w.write_all(mark)
    }

    fn line<W: ?Sized + std::io::Write>(&self, w: &mut W) -> std::io::Result<()> {
        match self.indent {
            Some(width) => write!(w, "\n{:1$}", "", width * self.depth),
            None => Ok(()),
        }
    }

    fn next<W: ?Sized + std::io::Write>(&mut self, w: &mut W, first: bool) -> std::io::Result<()> {
        if !first {
            w.write_all(self.item.as_bytes())?;
        }
        self.filled = true;
        self.line(w)
    }
}

impl Formatter for Python<'_> {
    fn write_f64<W: ?Sized + std::io::Write>(&mut self, w: &mut W, value: f64) -> std::io::Result<()> {
        w.write_all(float(value).as_bytes())
    }

    fn begin_array<W: ?Sized + std::io::Write>(&mut self, w: &mut W) -> std::io::Result<()> {
        self.open(w, b"[")
    }

    fn end_array<W: ?Sized + std::io::Write>(&mut self, w: &mut W) -> std::io::Result<()> {
        self.close(w, b"]")
    }

    fn begin_array_value<W: ?Sized + std::io::Write>(
        &mut self,
        w: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        self.next(w, first)
    }

    fn begin_object<W: ?Sized + std::io::Write>(&mut self, w: &mut W) -> std::io::Result<()> {
        self.open(w, b"{")
    }

    fn end_object<W: ?Sized + std::io::Write>(&mut self, w: &mut W) -> std::io::Result<()> {
        self.close(w, b"}")
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(
        &mut self,
        w: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        self.next(w, first)
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, w: &mut W) -> std::io::Result<()> {
        w.write_all(self.key.as_bytes())
    }

    fn write_string_fragment<W: ?Sized + std::io::Write>(
        &mut self,
        w: &mut W,
        fragment: &str,
    ) -> std::io::Result<()> {
        // Python escapes DEL only with ensure_ascii, as serde_json never does.
        if !self.ensure_ascii || (fragment.is_ascii() && !fragment.contains('\u{7f}')) {
            return w.write_all(fragment.as_bytes());
        }
        for unit in fragment.encode_utf16() {
            match unit {
                0..0x7f => w.write_all(&[unit as u8])?,
                0x7f => w.write_all(&[0x7f])?,
                _ => write!(w, "\\u{unit:04x}")?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn values_print_as_in_python() {
        let show = |value: Value| text(&Jinja::from(minijinja::value::Serde(&value)));
        // str({'a': [1, 1.0, True, None, "it's", 'q"\n']})
        let value = json!({"a": [1, 1.0, true, null, "it's", "q\"\n"]});
        assert_eq!(show(value), r#"{'a': [1, 1.0, True, None, "it's", 'q"\n']}"#);
        assert_eq!(show(json!("plain")), "plain");
        assert_eq!(show(json!(null)), "None");
    }

    #[test]
    fn floats_print_as_in_python() {
        let all = [1e16, 1e15, 1e-5, 1.5e-7, 0.0001, 1e300, -2.5e22, 0.0, 100.0, 123_456_789.125];
        let want = [
            "1e+16",
            "1000000000000000.0",
            "1e-05",
            "1.5e-07",
            "0.0001",
            "1e+300",
            "-2.5e+22",
            "0.0",
            "100.0",
            "123456789.125",
        ];
        assert_eq!(all.map(float), want);
    }

    #[test]
    fn dumps_has_pythons_separators_and_indentation() {
        let value = json!({"b": [1, {"c": []}], "a": "é<\u{1f600}>"});
        let plain = Dumps::default();
        assert_eq!(plain.run(value.clone()).unwrap(), "{\"b\": [1, {\"c\": []}], \"a\": \"é<\u{1f600}>\"}");
        let ascii = Dumps { ensure_ascii: true, sort_keys: true, ..Dumps::default() };
        // json.dumps(value, sort_keys=True)
        assert_eq!(
            ascii.run(value.clone()).unwrap(),
            r#"{"a": "\u00e9<\ud83d\ude00>", "b": [1, {"c": []}]}"#
        );
        let indented = Dumps { indent: Some(2), ..Dumps::default() };
        let want = "{\n  \"b\": [\n    1,\n    {\n      \"c\": []\n    }\n  ],\n  \"a\": \"é<\u{1f600}>\"\n}";
        assert_eq!(indented.run(value).unwrap(), want);
    }
}
