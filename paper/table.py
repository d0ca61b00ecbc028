"""The table of paper/README.md, written from the JSON files: `python -m paper.table` puts it there.

A test compares the README with what this makes, so its numbers cannot drift from paper/results.
"""

from __future__ import annotations

from pathlib import Path

from paper import report

README = Path(__file__).parent / "README.md"
START, END = "<!-- table: written by python -m paper.table -->", "<!-- end of table -->"

FIGURES = ("fig1", "fig2_left", "fig2_mid", "fig2_right", "fig3", "fig4", "attack", "hospital", "fig6", "contrast")

SAYS = {
    "fig1": (
        "Without H⁻¹ every row of the query's label helps and every other one harms, and that is wrong: many "
        "harmful rows share the label. Without the train loss many rows are overestimated. Panels span about −140 "
        "… 205, −16 … 18 and −24 … 26."
    ),
    "fig2_left": ("CG: predictions lie on the diagonal, −0.027 … 0.031. No correlation is printed."),
    "fig2_mid": (
        "LiSSA (r = 10, t = 5,000): on the diagonal with some spread; r = 1 is enough to find the most important "
        "rows. No number is printed."
    ),
    "fig2_right": (
        "Pearson 0.86 (the authors' notebook: 0.875) for the 100 rows with the largest |value|, by CG with damping "
        "0.01 at a point that is no minimum. Changes about −0.03 … 0.05."
    ),
    "fig3": (
        "Pearson 0.95 at t = 0.001 and 0.91 at t = 0.1; at t = 0 predictions are about 20 times too big (the "
        "authors' notebook has Pearson 0.63)."
    ),
    "fig4": (
        "Influence of the RBF machine fades with pixel distance; near fish help and near dogs harm. For Inception "
        "distance does not matter, and dogs help as well: the fifth most helpful image is a dog (the authors' "
        "notebook: the 20th). The largest values are about 0.022 and 0.0004, distances 190 … 660; p(correct) 0.9966."
    ),
    "fig6": (
        "At 10 % inspected self-influence finds 62 % of the wrong labels, loss 52 %, chance 10 %; test accuracy 0.955, "
        "0.932 and 0.898, from 0.888; 0.976 with all labels right."
    ),
    "attack": (
        "Section 5.2: one changed training image flips 335 of 591 test images (57 %; either of two tried), two 77 %, "
        "ten 590. Thirty at once: 16 flip. The pixels change by half a level, the features by 11.1 of a distance of "
        "12.9."
    ),
    "hospital": (
        "Section 5.3: the three readmitted children harm, the other one helps, each 30–40 times the next row (the "
        "authors' notebook: 28 and 56 times). 13 of 137 test children flip; 14 of 127 features have a larger "
        "coefficient than the child indicator, whose change has by far the largest effect on the influence."
    ),
    "contrast": (
        "Section 6: Cadamuro et al. look for a small set of labels whose change makes a wrong prediction right, "
        "and solve it for least squares and Gaussian processes; influence functions solve it for more models and "
        "discrete labels. No experiment."
    ),
}

WE = {
    "fig1": (
        "Separated exactly: {labels_separated_without_hessian:d} (1 = yes). Harmful sevens: "
        "{harmful_same_label_rows:,} of {same_label_rows:,}, {harmful_same_label_rows_by_loss_alone:,} if the "
        "penalty's share is left out. Overestimated: {overestimated_rows:,} of the "
        "{rows_with_large_value_without_loss:,} rows that look large. Panels span {lowest_without_loss:.0f} … "
        "{highest_without_loss:.0f}, {lowest_without_hessian:.0f} … {highest_without_hessian:.0f} and "
        "{lowest_without_both:.0f} … {highest_without_both:.0f}."
    ),
    "fig2_left": (
        "{n_removed:d} rows: Pearson {pearson:.7f}, slope {slope:.4f}; with the Newton step of each removal "
        "{pearson_newton:.7f}, {slope_newton:.4f}. Changes up to {largest_change:.4f} nats, largest error "
        "{largest_error:.1e} (Newton step {largest_error_newton:.1e})."
    ),
    "fig2_mid": (
        "Pearson with the retrained {pearson:.4f} (one repeat {pearson_of_one_repeat:.4f}), slope {slope:.3f}; of "
        "the true top 100 rows {top_100_found:d} are found, {top_100_found_by_one_repeat:d} by one repeat. Largest"
        " z {max_z:.1f}, median {median_z:.2f}; over all rows {max_z_of_all_rows:.1f}."
    ),
    "fig2_right": (
        "{n_removed:d} rows: Pearson {pearson:.3f}, slope {slope:.2f}; by the Newton step of each "
        "removal {pearson_newton:.3f}, {slope_newton:.2f}; by Gauss–Newton "
        "{pearson_gauss_newton_0_01:.3f}, {slope_gauss_newton_0_01:.2f}. With damping 0.1 and 0.001: "
        "{pearson_hessian_0_1:.2f} and {pearson_gauss_newton_0_001:.2f} (Gauss–Newton). The control drifts "
        "{control_drift:+.3f}; changes up to {largest_change:.3f}. Accuracy {train_accuracy:.4f}, test "
        "{test_accuracy:.4f}. At least {negative_eigenvalues_at_least:d} negative eigenvalues, λmin at most "
        "{smallest_eigenvalue_at_most:.4f}."
    ),
    "fig3": (
        "Pearson {pearson_t0:.2f}, {pearson_t0_001:.3f}, {pearson_t0_1:.3f} at t = 0, 0.001, 0.1; slopes "
        "{slope_t0:.3f}, {slope_t0_001:.2f}, {slope_t0_1:.2f}. At t = 0 between "
        "{pearson_t0_corner_rows_outside:.2f} and {pearson_t0_corner_rows_inside:.2f} by convention."
    ),
    "fig4": (
        "Spearman of |value| and distance, mean over {queries:d} test photographs: RBF "
        "{rbf_distance_correlation:+.2f}, EfficientNet-Lite0 {network_distance_correlation:+.2f}, SqueezeNet "
        "{squeezenet_distance_correlation:+.2f}, Inception {inception_v3_nsfwjs_distance_correlation:+.2f}. RBF, one "
        "fish: mean value of the nearest tenth: fish {rbf_mean_value_of_near_fish:+.4f}, dogs "
        "{rbf_mean_value_of_near_dogs:+.4f}, of the others {rbf_mean_value_of_far_fish:+.5f} and "
        "{rbf_mean_value_of_far_dogs:+.5f}; largest value {rbf_largest_value:.3f}, distances {nearest_distance:.0f} … "
        "{farthest_distance:.0f}. The first helpful dog has rank {network_rank_of_first_helpful_dog:d} with "
        "EfficientNet, {inception_v3_nsfwjs_rank_of_first_helpful_dog:d} with Inception; "
        "{network_share_of_dogs_that_help:.0%} and {inception_v3_nsfwjs_share_of_dogs_that_help:.0%} of the dogs help. "
        "The two models share {shared_of_20_most_helpful:.0%} of the 20 most helpful rows."
    ),
    "fig6": (
        "{repeats:d} repeats, at 10 % inspected: self-influence {found_influence_0_10:.1%} ± "
        "{found_influence_0_10_standard_error:.1%} of the wrong labels, by the published formula "
        "{found_influence_published_0_10:.1%}, loss {found_loss_0_10:.1%}, chance {found_random_0_10:.1%}; the gap to "
        "loss is {found_gap_0_10:.3f} ± {found_gap_0_10_standard_error:.3f}. Test accuracy "
        "{accuracy_influence_0_10:.3f}, {accuracy_influence_published_0_10:.3f}, {accuracy_loss_0_10:.3f} and "
        "{accuracy_random_0_10:.3f}, from {accuracy_flipped:.3f}; {accuracy_clean:.3f} with all labels right. At 30 %: "
        "{found_influence_0_30:.1%}, {found_influence_published_0_30:.1%}, {found_loss_0_30:.1%}."
    ),
    "attack": (
        "Of {targets:d} test photographs one row flips {flipped_1:d} ({rate_1:.0%}; the top row alone "
        "{flipped_1_top:d}), two {flipped_2:d} ({rate_2:.0%}), ten {flipped_10:d}. Thirty at once: {multi_flipped:d}. "
        "Largest change of a pixel {pixel_linf_max:.4f} levels, the same 8-bit photograph every time; features move by "
        "{feature_l2_median:.1f} of {feature_to_centroid_median:.1f} (median). Accuracy on the test photographs "
        "{clean_test_accuracy:.3f} before, {test_accuracy_median:.3f} after. On features as the network gives them, "
        "{raw_targets:d} photographs: one row {raw_rate_1:.0%}, two {raw_rate_2:.0%}, ten {raw_rate_10:.0%}."
    ),
    "hospital": (
        "The same four rows, the third child {harmful_ratio:.1f} and the other {helpful_ratio:.1f} times the next; "
        "each really removed, the Newton step is off by at most {largest_error_of_removal_newton:.4f} of at least "
        "{smallest_actual_removal:.3f}. {children_flipped:d} of {test_children:d} test children flip; "
        "{larger_coefficients:d} features have a larger coefficient. Child indicator in equation 5 of the child that "
        "helps: place {place_signed:d} signed, {place_absolute:d} in size (behind discharge 11), and {place_held:d} "
        "among what the rows hold, for each of the four."
    ),
    "contrast": (
        "{queries:d} wrong digits: {corrected:d} really corrected by the predicted set of new labels, "
        "{removal_corrected:d} by the predicted removals (fitted from scratch by sklearn: "
        "{corrected_from_scratch:d} and {removal_corrected_from_scratch:d}). Median set {median_set_size:.0f} "
        "labels of 5,000, {removal_median_set_size:.0f} removals; actual over predicted change of the margin "
        "{calibration:.3f}, 90% of them {calibration_low:.3f} … {calibration_high:.3f}. Labels needed in other "
        "orders, found by refitting: nearest image {median_set_size_nearest:.0f}, random of the class "
        "{median_set_size_random:.0f}, highest loss of the class {median_set_size_loss:.0f}, highest loss of all "
        "{median_set_size_loss_all:.0f} ({reached_loss_all:d} of {queries:d} within 512)."
    ),
}

WHY = {
    "fig1": (
        "Same data, model and query. The panels without H use the gradient of the loss alone, as section 2.3 does."
        " With the penalty's share, as in the authors' code, a constant {penalty_share_without_hessian:.4f} is "
        "added to all rows and {crossed_rows_with_penalty_share:,} rows of almost no gradient cross 0."
    ),
    "fig2_left": (
        "Exact solution by Cholesky in float64, instead of Newton-CG in float32; every model trained again to a "
        "gradient of 1e-6 of one row's by Newton's method, instead of warm-started L-BFGS. What is left of first "
        "order is curvature that goes with the row; the Newton step takes it along."
    ),
    "fig2_mid": (
        "Rows are drawn with replacement; the authors' iterator walks a permutation. The removed rows are those of "
        "fig2_left. 5,000 steps at scale 25 leave up to {truncation:.0%} of bias in flat directions, which no standard "
        "error holds. Ten repeats leave z nine degrees of freedom, so large ones among 55,000 rows are no surprise."
    ),
    "fig2_right": (
        "Same network, rows, penalty, query and damping; `--literal` takes the authors' steps. Here: Adam 5,500 steps "
        "at 0.003 … 0.00003, then L-BFGS on all rows to R = {risk:.3f} (the paper's footnote: 0.14 … 0.12), ‖∇R‖ = "
        "{gradient_norm:.3f}; each row is trained on from there by ten implicit steps of gradient descent on all other "
        "rows, for a time of 1/damping, instead of 30,000 steps of Adam (after two steps Pearson is "
        "{pearson_after_2_steps:.3f}, after five {pearson_after_5_steps:.3f}). The control is subtracted; the "
        "authors only print it. A row's own curvature goes with it (leverage {median_leverage:.2f}, up to "
        "{largest_leverage:.2f}): that is most of the slope, and what the Newton step takes along."
    ),
    "fig3": (
        "Same SVM, query and rows. {rows_on_the_corner:d} rows lie on the corner of the hinge, and at t = 0 "
        "rounding decides their slope ({rows_that_count_as_inside:d} rows count as inside the margin here)."
    ),
    "fig4": (
        "Other photographs: Imagenette's springers and tenches instead of ImageNet's broad dog and fish, enlarged from "
        "224 × 224, and other networks: EfficientNet-Lite0 ({network_test_right:d} of 600 right), SqueezeNet 1.1 "
        "({squeezenet_test_right:d}), an Inception v3 fine-tuned for another task ({inception_v3_nsfwjs_test_right:d}; "
        "the paper's 591); `--nets inception_v3_torchvision` takes the paper's where torchvision is installed. Surer "
        "networks have smaller values: largest {network_largest_value:.1e}, {squeezenet_largest_value:.1e}, "
        "{inception_v3_nsfwjs_largest_value:.1e}. The query is picked by its margin ({rbf_output_of_the_query:.3f}; "
        "paper 0.990). The paper plots distance unsquared, its caption says squared. No photographs are drawn, for "
        "they may not be passed on."
    ),
    "fig6": (
        "Same e-mails, sizes, penalty and loop; the order of the authors' files, hence the split, is not known, and "
        "words are counted without spaCy ({words:,} of them). The released code that drew the paper's curve lost a "
        "square: σ instead of σ² times xᵀH⁻¹x. Its curve is the dashed one here, and the paper's readings lie on it. "
        "The correct formula finds fewer at first and more beyond 20 %. Bars are standard errors."
    ),
    "attack": (
        "SqueezeNet 1.1 on Imagenette's springers and tenches instead of Inception v3. The top layer is fitted on "
        "whitened features (standard deviation {scale:g}), and that is most of the success: whitening makes large what "
        "the training photographs hardly vary in. Steps of {step:g} level and at most {iterations:d} iterations "
        "instead of 0.02 and 100, with an early stop. Every flip is scikit-learn's fit from scratch on recomputed "
        "features. One row moves thirty dogs less than in the paper, whose thirty are photographs of one dog."
    ),
    "hospital": (
        "Same rows, split and query (all indices come out as the authors'). Their fits stopped at 1,000 iterations "
        "with a gradient of {paper_gradient_norm:.4f}; ours is {gradient_norm:.0e}, and at the minimum more children "
        "flip: the query's p(not readmitted) falls to {query_probability:.3f} instead of "
        "{paper_query_probability:.3f}. Derivatives by features that a row does not hold follow θ, hence discharge "
        "11."
    ),
    "contrast": (
        "Ours alone. The sets are judged by two Newton steps that keep the curvature at θ̂. The nearest images "
        "need few more rows than influence. For {removal_without_a_set:d} query no half of the rows is predicted "
        "to be enough to remove; the largest set of removals has {removal_largest_set_size:,} rows, where "
        "prediction is no longer a small change."
    ),
}


def table() -> str:
    """The table as Markdown; a dot in a number's name is written _ in the texts above."""
    lines = ["| figure | paper says | we measure | why they differ |", "|---|---|---|---|"]
    for name in FIGURES:
        told = report.read(name)
        numbers = {key.replace(".", "_"): value for key, value in (told["settings"] | told["numbers"]).items()}
        says, we, why = (text[name].format_map(numbers).replace("|value|", "\\|value\\|") for text in (SAYS, WE, WHY))
        lines.append(f"| [{name}](results/{name}.png) | {says} | {we.replace('-', '−')} | {why.replace(' -', ' −')} |")
    return "\n".join(lines)


def main() -> None:
    """Put the table into the README."""
    text = README.read_text(encoding="utf-8")
    head, rest = text.split(START)
    README.write_text(f"{head}{START}\n\n{table()}\n\n{END}{rest.split(END)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
