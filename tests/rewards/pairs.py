"""Hand-made pairs (gold, answer) by rule, each with what the verifier must say. Used by test_pairs.py."""

# What a user would call the same answer.
SAME: dict[str, list[tuple[str, str]]] = {
    "spelling of a number": [
        ("42", "42"), ("42", " 42 "), ("42", "$42$"), ("42", "42."), ("42", "+42"), ("42", "042"), ("42", "42.0"),
        ("1234", "1,234"), ("1,234,567", "1234567"), (r"29,\!322", "29322"), ("1234", r"1{,}234"), ("-3", "−3"),
        ("-3", "- 3"), ("0", "-0"), ("073", "73"), ("0.5", ".5"), ("2.50", "2.5"), ("1000000", "10^6"),
    ],
    "fractions": [
        (r"\frac{1}{2}", "1/2"), (r"\frac12", "0.5"), (r"\dfrac{3}{4}", r"\tfrac34"), (r"\frac{2}{4}", r"\frac{1}{2}"),
        (r"-\frac{1}{3}", r"\frac{-1}{3}"), (r"\frac{1}{-3}", "-1/3"), (r"3\frac{1}{2}", r"\frac{7}{2}"),
        ("3.5", "3 1/2"), ("½", "0.5"), (r"\frac{14}{7}", "2"), (r"0.\overline{3}", r"\frac13"), ("0.125", "1/8"),
    ],
    "percent": [("10\\%", "10%"), ("10\\%", "0.1"), ("10\\%", "1/10"), ("0.25", r"25\%"), ("12.5\\%", "12.5 percent")],
    "scientific": [
        ("4.5e33", r"4.5 \times 10^{33}"), ("4e-9", r"4\cdot 10^{-9}"), ("5.3e-9", "0.0000000053"), ("1e3", "1000"),
        ("4.5e33", "4.5 × 10^33"),
    ],
    "roots and constants": [
        (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt2}"), (r"2\sqrt{3}", "2*sqrt(3)"), (r"\sqrt{12}", r"2\sqrt3"),
        (r"\frac{\pi}{2}", "pi/2"), (r"\frac{\pi}{2}", r"0.5\pi"), (r"2\pi", "2π"), (r"e^2", r"\exp(2)"),
        (r"\log_2 8", "3"), (r"\ln(e^5)", "5"), (r"\binom{10}{3}", "120"), ("5!", "120"), (r"\sin(30^\circ)", "0.5"),
        (r"\cos(\pi)", "-1"), (r"\sqrt[3]{27}", "3"), (r"2^{10}", "1024"), (r"\frac{100!}{99!}", "100"),
        (r"2^{2019}-2020", r"2\cdot 2^{2018} - 2020"), (r"\sqrt{3+2\sqrt2}", r"1+\sqrt2"), (r"\frac{1}{2^{99}}", "2^{-99}"),
        ("2(\\sqrt6+\\sqrt2)", r"2\sqrt6 + 2\sqrt2"), (r"\frac{1+i}{2}", r"\frac12 + \frac{i}{2}"), ("|{-3}|", "3"),
    ],
    "rounded decimal of an exact form": [(r"\frac13", "0.333333"), ("\\pi", "3.141593"), (r"\sqrt2", "1.41421356")],
    "expressions": [
        ("x^2+2x+1", "(x+1)^2"), ("x+1", "1+x"), ("2x", "2*x"), (r"\frac{x}{2}", "0.5x"), ("a b", "b a"),
        (r"\sin^2 t", r"1-\cos^2 t"), (r"\frac{1}{x^2}", "x^{-2}"), (r"\frac{x^2-1}{x-1}", "x+1"), ("x^2", "x**2"),
        (r"e^{x+y}", r"e^x e^y"), (r"\sqrt{x^2}", "|x|"), (r"\frac{n(n+1)}{2}", r"\frac{n^2+n}{2}"),
        (r"x\sqrt{x}", "x^{3/2}"), (r"\left\lfloor\frac{2n}{3}\right\rfloor+1", r"1+\lfloor 2n/3 \rfloor"),
    ],
    "names and equations": [
        ("5", "x=5"), ("x=5", "5"), ("x=5", "5=x"), ("5", "x = 2+3 = 5"), ("y=2x+1", "2x+1"), ("2x+1", "y=2x+1"),
        ("y=2x+1", "2x-y+1=0"), ("f(x)=2x", "2x"), ("x^2+y^2=4", "2x^2+2y^2=8"), ("x-2y=3", "2y-x=-3"),
        ("(x,y)=(1,2)", "(1,2)"), ("(1,2)", "(x,y)=(1,2)"), (r"x \approx 8.24", "8.24"),
    ],
    "lists and sets": [
        ("1,2", "2,1"), ("1, 2", r"\{1,2\}"), ("1,2", "1 and 2"), ("1,2", r"1 \text{ or } 2"), ("1,2", "x=1, x=2"),
        ("x=1, x=2", "2, 1"), (r"\pm 3", "3,-3"), (r"1\pm\sqrt2", r"1-\sqrt2, 1+\sqrt2"), ("x=1,y=2", "y=2,x=1"),
        ("x=1,y=2", "1,2"), ("(1,2),(3,4)", "(3,4), (1,2)"), (r"\{5\}", "5"), (r"\emptyset", "∅"),
        ("11, 13", "13; 11"), (r"\frac12, 3", "3, 0.5"),
    ],
    "tuples, intervals, inequalities": [
        ("(1,2)", r"\left( 1, 2 \right)"), ("(1,2)", "1,2"), ("[0,1)", "[0, 1)"), ("(0,1)", "0<x<1"),
        ("[0,1)", r"0 \le x < 1"), (r"(-\infty,3]", "x≤3"), (r"(2,\infty)", "x>2"), ("x>2", "2<x"), ("x>2", r"x\in(2,\infty)"),
        (r"(-\infty,1)\cup(2,\infty)", r"(2,\infty)\cup(-\infty,1)"), (r"(-\infty,1)\cup(2,\infty)", "x<1 or x>2"),
        ("x+y>2", "2x+2y>4"), (r"(3,\frac{\pi}{2})", "(3, pi/2)"), (r"[-1, \sqrt4]", "[-1,2]"), (r"\langle 1,2\rangle", "(1,2)"),
        ("(-3, 3)", "3 > x > -3"),
    ],
    "matrices": [
        (r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", r"\begin{bmatrix}1&2\\3&4\end{bmatrix}"),
        (r"\begin{pmatrix} 1/2 \\ -3 \end{pmatrix}", r"\begin{pmatrix} 0.5 \\ -3 \end{pmatrix}"),
    ],
    "units and money": [
        (r"7\text{ hours}", "7"), ("7", "7 hours"), (r"5\text{ cm}", "5 cm"), (r"5\text{ cm}^2", "5 square centimeters"),
        (r"30^\circ", "30"), ("30^\\circ", "30 degrees"), (r"\$18", "18"), ("18", "$18"), ("18", "18 dollars"),
        (r"10\text{ square units}", "10"), (r"\$1,234.50", "1234.5"), (r"3\text{ ft}", "3 feet"),
    ],
    "words and letters": [
        (r"\text{even}", "even"), ("Friday", r"\text{friday}"), (r"\text{(E)}", "E"), ("(B)", "B"), ("B", r"\textbf{(B)}"),
        (r"\text{Maria Lopez}", "maria  lopez"), ("no", r"\text{No}"), (r"\text{A,C}", "A, C"), ("43_5", "43_{5}"),
        ("1011_2", r"1011_{\text{two}}"),
    ],
}  # fmt: skip

# Near misses: each must be wrong.
DIFFERENT: dict[str, list[tuple[str, str]]] = {
    "sign": [
        ("42", "-42"), ("-3", "3"), (r"\frac12", r"-\frac12"), (r"\sqrt2", r"-\sqrt2"), ("x-1", "1-x"), ("(1,-2)", "(1,2)"),
        (r"\pm3", "3"), ("3", r"\pm3"), (r"\infty", r"-\infty"), ("x>2", "x<2"), ("x>2", "-x>-2"), ("2+3i", "2-3i"),
    ],
    "off by one": [
        ("42", "43"), ("2^{10}", "1023"), ("5!", "6!"), (r"\binom{10}{3}", r"\binom{10}{4}"), ("2^{2019}-2020", "2^{2019}-2021"),
        (r"\frac{n(n+1)}{2}", r"\frac{n(n-1)}{2}"), (r"6 \times 5^{2015}", r"6 \times 5^{2016}"), ("100!", "100!+1"),
        (r"2^{2019}\sqrt2-2020", r"2^{2019}\sqrt2-2021"), ("x^{10}", "x^{11}"),
    ],
    "magnitude": [
        (r"\frac{1}{2^{99}}", r"\frac{1}{2^{98}}"), ("0.0000001", "0.0000002"), ("4e33", "4e34"), ("5.3e-9", "5.3e-8"),
        (r"\frac{\sqrt2}{10^{50}}", r"\frac{\sqrt3}{10^{50}}"), (r"10^{-30}", "0"), ("1e-12", "0"), ("10^{100}", "10^{100}+1"),
        (r"\frac{x}{10^{40}}", r"\frac{2x}{10^{40}}"), ("1,234", "1.234"), ("12", "1 2"), ("12", "1,2"),
    ],
    "rounding": [
        (r"\frac13", "0.33"), (r"\frac13", "0.3333"), (r"\frac23", "0.67"), (r"\pi", "3.14"), (r"\pi", "3.1416"),
        (r"\pi", r"\frac{22}{7}"), (r"\sqrt2", "1.414"), (r"\sqrt2", "1.414214001"), ("0.333333", "0.333334"),
        ("3.14", r"\pi"), ("2.5", "3"), ("1.60", "1.6001"), (r"e^{\pi\sqrt{163}}", "262537412640768744"), ("2.68", "2.7"),
        (r"\frac{1}{2^{20}}", "0.000001"),
    ],
    "percent": [("10", r"10\%"), (r"10\%", "10"), (r"10\%", "1"), (r"10\%", r"11\%"), ("0.1", "0.1\\%"), ("25%", "2.5")],
    "unit": [
        (r"5\text{ cm}", r"5\text{ m}"), (r"5\text{ cm}^2", r"5\text{ cm}"), ("5 hours", "5 minutes"), (r"\$5", "5 cents"),
        (r"5\text{ ft}", "5 inches"), ("5 miles", "5 km"), (r"5\text{ cm}^2", r"5\text{ cm}^3"), ("30^\\circ", r"\frac{\pi}{6}"),
        (r"3\text{ m/s}", r"3\text{ km/h}"), (r"3\text{ dogs}", r"3\text{ cats}"), (r"8\text{ a.m.}", r"8\text{ p.m.}"),
    ],
    "interval end": [
        ("[0,1]", "(0,1)"), ("[0,1)", "(0,1]"), ("(0,1)", "[0,1]"), (r"(-\infty,3]", "x<3"), (r"(2,\infty)", r"x\geq 2"),
        (r"(2,\infty)", r"(-\infty,2)"), ("[0,1]", "[0,2]"), ("(0,1)", r"0\le x\le 1"), ("(5,3)", "(7,2)"),
        (r"(-\infty,1)\cup(2,\infty)", r"(-\infty,1]\cup(2,\infty)"), (r"(-\infty,1)\cup(2,\infty)", r"(-\infty,1)"),
        (r"(-\infty,1)\cup(2,\infty)", "(1,2)"), ("x>2", "y>2"), ("(0,1)", r"\{0,1\}"),
    ],
    "missing or extra solution": [
        ("1,2", "1"), ("1,2", "2"), ("1", "1,2"), ("1,2,3", "1,2"), ("1,2", "1,2,3"), (r"\pm3", "3,3"), ("1,2", "1,1"),
        (r"1\pm\sqrt2", r"1+\sqrt2"), ("x=1,y=2", "x=1"), ("(1,2),(3,4)", "(1,2)"), ("(1,2),(3,4)", "(1,2,3,4)"),
        ("7", "7, 8"), ("8", "7 or 8"), (r"\{1,2\}", r"\{1,2,4\}"), ("5", r"\{5,6\}"), (r"\emptyset", "0"),
    ],
    "order and coordinates": [
        ("(1,2)", "(2,1)"), ("(1,2)", "2,1"), ("(1,2),(3,4)", "(2,1),(3,4)"), ("(1,2)", r"\{2,1\}"), ("x=1,y=2", "2,1"),
        ("x=1,y=2", "x=2,y=1"), ("(x,y)=(1,2)", "(x,y)=(2,1)"), ("(1,2)", "(1,2,0)"), ("(r,\\theta)", "(\\theta,r)"),
        (r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", r"\begin{pmatrix} 1 & 3 \\ 2 & 4 \end{pmatrix}"),
        (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 1 & 2 \end{pmatrix}"),
        (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 2 \\ 1 \end{pmatrix}"),
    ],
    "name of the unknown": [
        ("x=5", "y=5"), ("y=2x", "x=2y"), ("x=5", "x+5=10"), ("x=5", "2x+3=13"), ("5", "2x=10"), ("7", "x=7=8"), ("8", "7=8"),
        ("2x+1", "2y+1"), ("a+b", "a+c"), ("f(x)", "f(y)"), ("x^2+y^2=4", "x^2+y^2=2"), ("y=2x+1", "y=2x-1"), ("4", "2+2=4"),
        ("5", r"x\neq 5"), ("5", "x>5"), ("x_1", "x_2"),
    ],
    "expression": [
        ("(x+1)^2", "x^2+1"), (r"\sqrt{x^2}", "x"), (r"\frac{1}{x}", "x"), ("2^x", "x^2"), (r"\sin x", r"\cos x"),
        (r"\frac12 x", r"\frac{1}{2x}"), ("xy", "x+y"), (r"e^{-x}", r"e^{x}"), (r"\log_2 8", r"\log_8 2"), ("|x|", "x"),
        (r"\lfloor x\rfloor", "x"), (r"\lfloor x\rfloor", r"\lceil x\rceil"), ("x^2", "2x"), (r"\frac{3}{4}", r"\frac{4}{3}"),
        (r"3\frac12", r"\frac32"), ("-2^2", "4"), (r"\sqrt{5}", r"\sqrt[3]{5}"), ("n", "n+10^{-20}"),
    ],
    "words": [
        (r"\text{even}", "odd"), ("even", "neve"), ("42", "The answer is 42"), ("42", r"\text{The answer is } 42"), ("B", "C"),
        ("(B)", "(C)"), ("B", "b"), ("A", "A or B"), (r"\text{A,C}", "A"), ("42", "forty-two"), ("no", "on"), ("43_5", "43_6"),
        ("43_5", "43"), ("43_5", "23"), ("Friday", "not Friday"), ("42", "about 42"), ("42", "42 or so"), ("42", "x"),
    ],
}  # fmt: skip
