//! Lists of CPUs as the kernel and people write them: `0-3,6`.

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
