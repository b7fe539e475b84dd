//! Reading answers by rules, as MixEval's rule parser defines them (`mix_eval/utils/metric_utils.py`), but that an answer
//! without an option is told apart and never drawn at random.

use std::sync::LazyLock;

use fancy_regex::Regex;

use super::items::letter;

/// The option that an answer names: the first letter that stands by itself, or else, in answers of more than a few
/// words, the first option whose text is in there.
pub fn option(response: &str, options: &[String]) -> Option<usize> {
    let mut bare = response;
    for mark in [',', '.', '!', '?', ';', ':', '\''] {
        bare = bare.trim_matches(mark);
    }
    let text = format!(" {bare} ");
    let around = [
        (" ", " "),
        (" ", "\n"),
        ("\n", " "),
        ("\n", "\n"),
        (" ", ". "),
        (" ", ".\n"),
        ("\n", ". "),
        ("\n", ".\n"),
        ("(", ")"),
        ("**", " "),
        (" ", "**"),
        ("**", ". "),
        (" ", ".**"),
    ];
    let by_letter = (0..options.len()).filter_map(|i| {
        let places =
            around.iter().filter_map(|(before, after)| text.find(&format!("{before}{}{after}", letter(i))));
        places.min().map(|at| (at, i))
    });
    if let Some((_, i)) = by_letter.min() {
        return Some(i);
    }
    if text.split_whitespace().count() <= 5 {
        return None;
    }
    let text = text.to_lowercase();
    let named = options.iter().enumerate().filter(|(_, option)| !option.is_empty());
    let places = named.filter_map(|(i, option)| Some((text.find(&option.to_lowercase())?, i)));
    places.min().map(|(_, i)| i)
}

/// A text or a number, as answers are compared.
#[derive(Debug, Clone, PartialEq)]
enum Part {
    Text(String),
    Number(f64),
}

/// A free answer has one of the right ones.
pub fn is_right(response: &str, answers: &[String]) -> bool {
    let right: Vec<Part> = answers.iter().flat_map(|answer| parts_of(answer)).collect();
    let mut said = key_phrases(response);
    let numbers: Vec<String> = said.iter().flat_map(|phrase| numbers(phrase)).collect();
    said.extend(numbers);
    let said = said.iter().flat_map(|phrase| parts_of(phrase));
    said.into_iter().any(|said| match said {
        Part::Number(_) => right.contains(&said),
        Part::Text(said) => {
            right.iter().any(|part| matches!(part, Part::Text(text) if said.contains(text.as_str())))
        }
    })
}

/// A number with two decimals, or the text in small letters; a single letter only with a space beside it.
fn parts_of(text: &str) -> Vec<Part> {
    let text = text.trim();
    if let Ok(number) = text.replace(',', "").parse::<f64>() {
        return vec![Part::Number(rounded(number, 2))];
    }
    let text = text.to_lowercase();
    if text.chars().count() == 1 {
        return vec![Part::Text(format!(" {text}")), Part::Text(format!("{text} "))];
    }
    vec![Part::Text(text)]
}

/// As Python's `round`, which looks at the number's exact value.
pub fn rounded(number: f64, digits: usize) -> f64 {
    format!("{number:.digits$}").parse().unwrap_or(number)
}

/// What follows the words that introduce an answer, the shortest of each line; or the whole where there are none.
fn key_phrases(response: &str) -> Vec<String> {
    const INTRODUCE: [&str; 8] =
        ["could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result "];
    let response = response.trim().trim_matches('.').to_lowercase();
    let lines: Vec<&str> = response.split('\n').collect();
    let mut found = Vec::new();
    for (i, line) in lines.iter().enumerate() {
        // The last line may be an equation.
        let equation = (i + 1 == lines.len()).then_some("=");
        // As in the reference an empty tail gives its place to the next one, however long.
        let mut shortest = "";
        for word in INTRODUCE.iter().copied().chain(equation) {
            let Some((_, tail)) = line.rsplit_once(word) else { continue };
            let tail = tail.trim();
            if shortest.is_empty() || tail.chars().count() < shortest.chars().count() {
                shortest = tail;
            }
        }
        let is_trivial = ["", ":", ",", ".", "!", "?", ";", "'"].contains(&shortest);
        found.extend((!is_trivial).then(|| shortest.to_string()));
    }
    if found.is_empty() { vec![response] } else { found }
}

/// Numbers with commas, in scientific notation, and plain.
fn numbers(text: &str) -> Vec<String> {
    static KINDS: LazyLock<[Regex; 3]> = LazyLock::new(|| {
        [
            r"-?\b\d{1,3}(?:,\d{3})+\b",
            r"-?\d+(?:\.\d+)?[eE][+-]?\d+",
            r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",
        ]
        .map(|pattern| Regex::new(pattern).expect("a pattern of the tests"))
    });
    let all = KINDS.iter().flat_map(|kind| kind.find_iter(text).filter_map(Result::ok));
    all.map(|found| found.as_str().to_string()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(texts: &[&str]) -> Vec<String> {
        texts.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn options_are_read_as_letters_first() {
        let four = options(&["red wine", "green tea", "blue ink", "black coffee"]);
        for (said, want) in [
            ("B", Some(1)),
            ("C.", Some(2)),
            ("The answer is (D).", Some(3)),
            ("**A. red wine**", Some(0)),
            ("It is\nC\nbecause B is wrong", Some(2)),
            ("I would say that blue ink is what he wrote with", Some(2)),
            ("green tea", None),
            ("I do not know", None),
            ("E", None),
            ("", None),
        ] {
            assert_eq!(option(said, &four), want, "{said:?}");
        }
    }

    #[test]
    fn free_answers_are_right_where_one_of_the_targets_stands() {
        let right = |said: &str, answers: &[&str]| is_right(said, &options(answers));
        assert!(right("The answer is: 1727", &["1727"]));
        assert!(right("So there are 1,234 of them", &["1234"]), "a number in a phrase");
        assert!(right("12 + 30 = 42", &["42.0"]));
        assert!(right("It could be the Republic of Zambia.", &["Zambia"]));
        assert!(!right("It is Congo.", &["Zambia"]));
        assert!(!right("The answer is 17", &["7"]));
        // Only the end of a line after "is" counts,
        assert!(!right("Zambia is a country", &["Zambia"]));
        // and a single letter only by itself.
        assert!(!right("xylophone", &["x"]));
        assert!(right("plan x or y", &["x"]));
        assert!(
            right("So the capital is \nLusaka", &["Lusaka"]),
            "an empty end of a line counts for nothing"
        );
        assert!(right("It is 2.675", &["2.67"]), "as Python rounds");
    }

    #[test]
    fn numbers_are_found_in_every_spelling() {
        assert_eq!(
            numbers("from 1,200 to 3.5e3 and -.5 or 12"),
            ["1,200", "3.5e3", "200", "3", "3", "-.5", "12"]
        );
    }
}
