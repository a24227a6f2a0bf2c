//! What is shown of the exports: as a screen, as lines, as JSON. Nothing in it moves a terminal
//! but what is written here.

use serde_json::{Map, Value, json};

use super::figures::{Figures, OPERATIONS, Rates};
use super::terminal::Size;
use crate::printable::{escaped_json, printable};

/// The state of an export that answers.
pub const SERVED: &str = "served";
/// The same, of a remote disk whose server is away.
pub const SERVER_AWAY: &str = "server away";
/// The columns of a number.
const CELL: usize = 5;
/// What is left for a file's name at least, before numbers are left out.
const NAME: usize = 18;
/// Lines above the exports.
const HEAD: usize = 2;

/// An export, in an interval.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Row {
    /// Its path.
    pub file: String,
    /// [`SERVED`], or what else is the matter.
    pub state: String,
    /// What it says of itself.
    pub report: Value,
    /// None before the end of the first interval, and where there is no answer.
    pub figures: Option<Figures>,
}

/// Which widths have a column.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Wanted {
    Always,
    /// Not on a narrow terminal.
    Usually,
    /// On a wide one.
    Wide,
}

struct Column(&'static str, Wanted, fn(&Figures) -> String);

const COLUMNS: [Column; 13] = [
    Column("r/s", Wanted::Always, |f| count(f.rates[0].requests)),
    Column("rB/s", Wanted::Always, |f| bytes(f.rates[0].bytes)),
    Column("rp50", Wanted::Wide, |f| percentile(&f.rates[0], 50)),
    Column("rp99", Wanted::Usually, |f| percentile(&f.rates[0], 99)),
    Column("w/s", Wanted::Always, |f| count(f.rates[1].requests)),
    Column("wB/s", Wanted::Always, |f| bytes(f.rates[1].bytes)),
    Column("wp50", Wanted::Wide, |f| percentile(&f.rates[1], 50)),
    Column("wp99", Wanted::Usually, |f| percentile(&f.rates[1], 99)),
    Column("f/s", Wanted::Always, |f| count(f.rates[2].requests)),
    Column("fp50", Wanted::Wide, |f| percentile(&f.rates[2], 50)),
    Column("fp99", Wanted::Usually, |f| percentile(&f.rates[2], 99)),
    Column("queue", Wanted::Always, |f| count(f.in_flight() as f64)),
    Column("err", Wanted::Always, |f| count(f.errors() as f64)),
];

/// The names of the columns, for [`lines`].
pub fn head() -> String {
    head_of(Wanted::Wide)
}

/// A line for each export, of any length.
pub fn lines(rows: &[Row]) -> Vec<String> {
    rows.iter().map(|row| line(Wanted::Wide, row, usize::MAX)).collect()
}

/// All of a screen, to be written over the one before. Exports that it has no room for are those
/// that do least.
pub fn screen(rows: &[Row], size: Size) -> String {
    let fits = |wanted: Wanted| cells_width(wanted) + NAME <= size.columns;
    let wanted = [Wanted::Wide, Wanted::Usually].into_iter().find(|wanted| fits(*wanted));
    let wanted = wanted.unwrap_or(Wanted::Always);
    let name_width = size.columns.saturating_sub(cells_width(wanted)).max(1);

    let number = rows.len();
    let plural = if number == 1 { "" } else { "s" };
    let title = format!("{number} export{plural}, each second; q ends");
    let mut screen = vec![title, format!("\x1b[7m{}\x1b[0m", head_of(wanted))];

    let sum = (number > 1).then(|| {
        let figures = Figures::sum(rows.iter().filter_map(|row| row.figures.as_ref()));
        line(wanted, &Row { figures: Some(figures), ..row_of("all", SERVED) }, name_width)
    });
    let room = size.rows.saturating_sub(HEAD + usize::from(sum.is_some()));
    let mut shown: Vec<&Row> = rows.iter().collect();
    let mut more = None;
    if number > room {
        let does = |row: &Row| row.figures.as_ref().map_or(0.0, Figures::requests);
        shown.sort_by(|a, b| does(b).total_cmp(&does(a)));
        shown.truncate(room.saturating_sub(1));
        more = Some(format!("and {} that do less", number - shown.len()));
    }
    screen.extend(shown.into_iter().map(|row| line(wanted, row, name_width)));
    screen.extend(more);
    screen.extend(sum);
    screen.truncate(size.rows);
    // The rest of each line, and of the screen, is what was there before.
    format!("\x1b[H{}\x1b[K\x1b[J", screen.join("\x1b[K\r\n"))
}

/// An object for each export, a line each, at a time in seconds since 1970.
pub fn json_lines(rows: &[Row], time: f64) -> String {
    let lines = rows.iter().map(|row| {
        let mut object = Map::new();
        let mut put = |name: &str, value: Value| object.insert(name.to_owned(), value);
        put("time", json!(rounded(time, 1000.0)));
        put("file", json!(row.file));
        put("state", json!(row.state));
        for name in ["source", "pid", "transport"] {
            put(name, row.report[name].clone());
        }
        put("seconds", json!(row.figures.as_ref().map(|figures| rounded(figures.seconds, 1000.0))));
        for (i, name) in OPERATIONS.iter().enumerate() {
            put(name, row.figures.as_ref().map_or(Value::Null, |f| operation(&f.rates[i])));
        }
        escaped_json(&Value::Object(object).to_string()) + "\n"
    });
    lines.collect()
}

fn operation(rates: &Rates) -> Value {
    json!({
        "requests_per_second": rounded(rates.requests, 10.0),
        "bytes_per_second": rates.bytes.round() as u64,
        "errors": rates.errors,
        "in_flight": rates.in_flight,
        "mean_us": rates.mean_us().map(|mean| rounded(mean, 10.0)),
        "p50_us": rates.percentile(50),
        "p99_us": rates.percentile(99),
    })
}

fn rounded(number: f64, parts: f64) -> f64 {
    (number * parts).round() / parts
}

fn row_of(file: &str, state: &str) -> Row {
    Row { file: file.into(), state: state.into(), ..Row::default() }
}

fn columns(wanted: Wanted) -> impl Iterator<Item = &'static Column> {
    COLUMNS.iter().filter(move |Column(_, least, _)| *least <= wanted)
}

/// Of the numbers, with the space behind each and one more.
fn cells_width(wanted: Wanted) -> usize {
    columns(wanted).count() * (CELL + 1) + 1
}

fn head_of(wanted: Wanted) -> String {
    let cells = columns(wanted).map(|Column(title, ..)| format!("{title:>CELL$} "));
    cells.collect::<String>() + " FILE"
}

fn line(wanted: Wanted, row: &Row, name_width: usize) -> String {
    let cell = |Column(_, _, cell): &Column| row.figures.as_ref().map_or("-".into(), cell);
    let cells = columns(wanted).map(|column| format!("{:>CELL$} ", cell(column)));
    let name = match row.state.as_str() {
        SERVED => printable(&row.file).into_owned(),
        state => format!("{}: {state}", printable(&row.file)),
    };
    format!("{} {}", cells.collect::<String>(), end_of(&name, name_width))
}

/// As much of the end of a name as there is room for: there it says most.
fn end_of(name: &str, width: usize) -> String {
    let len = name.chars().count();
    if len <= width {
        return name.to_owned();
    }
    let end = name.chars().skip(len + 1 - width);
    std::iter::once('…').chain(end).collect()
}

/// In five characters.
fn count(number: f64) -> String {
    match number {
        ..99_999.5 => format!("{number:.0}"),
        ..999_500.0 => format!("{:.0}k", number / 1e3),
        ..9_950_000.0 => format!("{:.1}M", number / 1e6),
        _ => format!("{:.0}M", number / 1e6),
    }
}

/// In five characters, in powers of 1024.
fn bytes(number: f64) -> String {
    let mut rest = number;
    let mut units = ["", "K", "M", "G", "T"].into_iter();
    let mut unit = units.next();
    while rest >= 999.5
        && let Some(next) = units.next()
    {
        (rest, unit) = (rest / 1024.0, Some(next));
    }
    let unit = unit.unwrap_or_default();
    match rest {
        ..9.95 if !unit.is_empty() => format!("{rest:.1}{unit}"),
        _ => format!("{rest:.0}{unit}"),
    }
}

fn percentile(rates: &Rates, hundredths: u64) -> String {
    rates.percentile(hundredths).map_or("-".into(), micros)
}

/// The bound of a bucket, in five characters.
fn micros(bound: u64) -> String {
    /// The last has everything from the one before on.
    const LAST: u64 = 1 << 31;
    let time = bound as f64;
    if bound >= LAST {
        ">17m".into()
    } else if time >= 1e7 {
        format!("{:.0}s", time / 1e6)
    } else if time >= 1e6 {
        format!("{:.1}s", time / 1e6)
    } else if time >= 1e4 {
        format!("{:.0}ms", time / 1e3)
    } else if time >= 1e3 {
        format!("{:.1}ms", time / 1e3)
    } else {
        format!("{bound}us")
    }
}
