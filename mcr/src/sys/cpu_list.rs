//! Lists of CPUs as the kernel and people write them: `0-3,6`.

use std::fmt::Write;

/// CPUs that a CPU set of the kernel's interface has room for.
const MAX_CPU: u32 = 1023;

/// The CPUs of a list, ascending, each once.
///
/// # Errors
///
/// What of the text is no CPU or range.
pub fn parse_cpus(text: &str) -> Result<Vec<u32>, String> {
    let mut cpus = Vec::new();
    for part in text.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        match (parse_cpu(first)?, parse_cpu(last)?) {
            (first, last) if first <= last => cpus.extend(first..=last),
            _ => return Err(format!("the range {part} ends before it begins")),
        }
    }
    cpus.sort_unstable();
    cpus.dedup();
    Ok(cpus)
}

fn parse_cpu(number: &str) -> Result<u32, String> {
    match number.parse() {
        Ok(cpu @ 0..=MAX_CPU) => Ok(cpu),
        _ => Err(format!("'{number}' is no CPU: write numbers from 0 to {MAX_CPU} and ranges, like 0-3,6")),
    }
}

/// `0-3,6` of an ascending list.
pub fn ranges(numbers: &[u32]) -> String {
    let mut text = String::new();
    let mut rest = numbers;
    while let [first, ..] = *rest {
        let run = (1..rest.len()).take_while(|&at| rest[at - 1].checked_add(1) == Some(rest[at])).count();
        let comma = if text.is_empty() { "" } else { "," };
        let _ = write!(text, "{comma}{first}");
        if run > 0 {
            let _ = write!(text, "-{}", rest[run]);
        }
        rest = &rest[run + 1..];
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_ranges() {
        for (numbers, text) in [
            (&[][..], ""),
            (&[4], "4"),
            (&[0, 1, 2, 3, 6], "0-3,6"),
            (&[0, 2, 3], "0,2-3"),
            (&[u32::MAX - 1, u32::MAX], "4294967294-4294967295"),
        ] {
            assert_eq!(ranges(numbers), text);
        }
    }
}
