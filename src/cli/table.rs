//! Tables: a header and columns as wide as their widest cell, for eyes and for `awk` alike.

/// Rows of text under a header.
#[derive(Debug)]
pub struct Table {
    header: Vec<&'static str>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// An empty table.
    pub fn new(header: &[&'static str]) -> Self {
        Self { header: header.to_vec(), rows: Vec::new() }
    }

    /// Adds a row with a cell for every column.
    pub fn row(&mut self, cells: Vec<String>) {
        debug_assert_eq!(cells.len(), self.header.len());
        // Whatever a user put into a name must neither break the row nor drive the terminal.
        let clean = |cell: String| {
            let cell: String =
                cell.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect();
            // An empty cell would shift the columns of whoever splits at white space.
            if cell.is_empty() { "-".to_owned() } else { cell }
        };
        self.rows.push(cells.into_iter().map(clean).collect());
    }
}

impl std::fmt::Display for Table {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let width = |column: usize| {
            let cells = self.rows.iter().map(|row| row[column].chars().count());
            cells.chain([self.header[column].len()]).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..self.header.len()).map(width).collect();
        let header = self.header.iter().map(|cell| (*cell).to_owned()).collect();
        for row in std::iter::once(&header).chain(&self.rows) {
            let mut line = String::new();
            for (cell, width) in row.iter().zip(&widths) {
                line.push_str(cell);
                line.extend(std::iter::repeat_n(' ', width + 3 - cell.chars().count()));
            }
            writeln!(f, "{}", line.trim_end())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let mut table = Table::new(&["ID", "STATE"]);
        table.row(vec!["grüße".into(), "running".into()]);
        table.row(vec!["x".into(), "paused".into()]);
        assert_eq!(table.to_string(), "ID      STATE\ngrüße   running\nx       paused\n");
    }

    #[test]
    fn cells_cannot_break_the_table() {
        let mut table = Table::new(&["ID", "NAME"]);
        table.row(vec!["a".into(), "\x1b[2Jevil\n".into()]);
        table.row(vec![String::new(), "b".into()]);
        let text = table.to_string();
        assert_eq!(text.lines().count(), 3);
        assert!(!text.contains('\x1b'));
        assert!(text.lines().nth(2).unwrap().starts_with("-    b"));
    }
}
